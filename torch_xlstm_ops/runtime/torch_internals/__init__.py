"""The only package that uses private names of torch: one function for each use, with a correct, slower fallback.

A test ensures that no other file uses a private name of torch. Each function calls the private API. If that was moved
or changed (ImportError, AttributeError, TypeError), the function warns once, uses its fallback from then on, and
`xlstm-ops info` reports it. Private modules are imported when they are used, not before.
"""

from torch_xlstm_ops.runtime.torch_internals.compile import (
    Admits,
    Raw,
    compile_raw,
    compiler_missing,
    forget_compile_threads,
)
from torch_xlstm_ops.runtime.torch_internals.conditions import Conditions
from torch_xlstm_ops.runtime.torch_internals.decompositions import (
    functional_mode,
    keep_as_call,
    register_decomposition,
)
from torch_xlstm_ops.runtime.torch_internals.dispatch import (
    below_autograd,
    functionalizes,
    next_is_device,
    without_autocast,
)
from torch_xlstm_ops.runtime.torch_internals.dynamo import (
    as_boxed,
    compile_graph,
    compile_key,
    frame,
    graph_breaks,
    hold_address,
    inductor_options,
    no_recompile_limit,
    operator_name,
    traced,
    user_stack,
)
from torch_xlstm_ops.runtime.torch_internals.generated import Generated, Kernel, put_together, taken_apart
from torch_xlstm_ops.runtime.torch_internals.inductor_changes import inductor_changes
from torch_xlstm_ops.runtime.torch_internals.inductor_choices import (
    PERSISTENT,
    reduction_choices,
    supported_options,
)
from torch_xlstm_ops.runtime.torch_internals.inductor_steps import steps_as_one_kernel
from torch_xlstm_ops.runtime.torch_internals.modes import (
    OperatorMode,
    forward_mode,
    outside_modes,
    prepares_graph,
    transforms,
    watched,
)
from torch_xlstm_ops.runtime.torch_internals.modules import global_hooks, hooks
from torch_xlstm_ops.runtime.torch_internals.need import NEEDS, Need, status
from torch_xlstm_ops.runtime.torch_internals.tensors import copy_all, like, written

__all__ = [
    "NEEDS",
    "PERSISTENT",
    "Admits",
    "Conditions",
    "Generated",
    "Kernel",
    "Need",
    "OperatorMode",
    "Raw",
    "as_boxed",
    "below_autograd",
    "compile_graph",
    "compile_key",
    "compile_raw",
    "compiler_missing",
    "copy_all",
    "forget_compile_threads",
    "forward_mode",
    "frame",
    "functional_mode",
    "functionalizes",
    "global_hooks",
    "graph_breaks",
    "hold_address",
    "hooks",
    "inductor_changes",
    "inductor_options",
    "keep_as_call",
    "like",
    "next_is_device",
    "no_recompile_limit",
    "operator_name",
    "outside_modes",
    "prepares_graph",
    "put_together",
    "reduction_choices",
    "register_decomposition",
    "status",
    "steps_as_one_kernel",
    "supported_options",
    "taken_apart",
    "traced",
    "transforms",
    "user_stack",
    "watched",
    "without_autocast",
    "written",
]
