"""The interface of a compiler backend to Dynamo and Inductor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import fx

from torch_xlstm_ops.runtime.torch_internals.need import need


class Frame(NamedTuple):
    """The frame that Dynamo traces in this thread."""

    compiler: Any  # the backend, as Dynamo wrapped it
    function: str  # the name of the frame's code


def _no_frame() -> Frame:
    return Frame(None, "")


@need(_no_frame, where=("torch._dynamo.symbolic_convert.InstructionTranslator.current_tx",),
      without='backend="xlstm" leaves functions of other packages to Inductor; operators are still spliced')
def frame() -> Frame:
    """Return the frame that Dynamo traces now, and its backend."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    tracer = InstructionTranslator.current_tx()
    return Frame(tracer.output.compiler_fn, tracer.f_code.co_name)


class _OneGraph:
    """Key of the graph that is being compiled, where torch does not identify it."""


_ONE_GRAPH = _OneGraph()


def _no_key() -> object:
    return _ONE_GRAPH


@need(_no_key, where=("torch._guards.TracingContext.get",),
      without="explain() may count the calls of one graph with the next")
def compile_key() -> object:
    """Return an object that identifies the graph that is being compiled in this thread."""
    from torch._guards import TracingContext

    return TracingContext.get()


def _no_stack() -> tuple[str, ...]:
    return ()


@need(_no_stack, where=("torch._guards.TracingContext.extract_stack",),
      without="explain() does not say where calls are")
def user_stack() -> tuple[str, ...]:
    """Return the frames that Dynamo traces, "file:line in function", the innermost last."""
    from torch._guards import TracingContext

    return tuple(f"{f.filename}:{f.lineno} in {f.name}" for f in TracingContext.extract_stack())


def _no_breaks() -> Counter[str]:
    return Counter()


@need(_no_breaks, where=("torch._dynamo.utils.counters",), without="explain() does not count graph breaks")
def graph_breaks() -> Counter[str]:
    """Return the number of Dynamo's graph breaks so far, by reason."""
    from torch._dynamo.utils import counters

    return Counter(counters["graph_break"])


def _keep_limit() -> AbstractContextManager[object]:
    return nullcontext()


@need(_keep_limit, where=("torch._dynamo.config.recompile_limit", "torch._dynamo.config.accumulated_recompile_limit"),
      without="many explanations of one model reach Dynamo's limit of compilations")
def no_recompile_limit() -> AbstractContextManager[object]:
    """Return a context manager without a limit on how often Dynamo compiles the same code."""
    from torch._dynamo import config

    many = 1 << 30
    patch: AbstractContextManager[object] = config.patch(recompile_limit=many, accumulated_recompile_limit=many)
    return patch


def _inductor_lists(mode: str | None) -> tuple[dict[str, Any], frozenset[str]]:
    import torch._inductor as inductor

    return ({} if mode is None else dict(inductor.list_mode_options(mode))), frozenset(inductor.list_options())


@need(_inductor_lists, where=("torch._inductor.list_mode_options", "torch._inductor.config.get_config_copy"),
      without="options of Inductor are known by the names that list_options() gives")
def inductor_options(mode: str | None) -> tuple[dict[str, Any], frozenset[str]]:
    """Return the options that a mode of Inductor sets, and the names of all options."""
    import torch._inductor as inductor

    known = frozenset(inductor.config.get_config_copy())
    return ({} if mode is None else dict(inductor.list_mode_options(mode))), known


Around = Callable[[Callable[[Any], Any], Any], Any]  # runs a compiled graph on its inputs


def _by_name(
    module: fx.GraphModule, examples: Sequence[Any], patches: Mapping[str, Any], around: Around | None
) -> Any:
    compiled: Any = torch.compile(module, backend="inductor", options=dict(patches) or None)
    if around is None:
        return compiled
    return lambda *inputs: around(lambda given: compiled(*given), inputs)


@need(_by_name, where=(
        "torch._inductor.compile_fx.compile_fx", "torch._inductor.compile_fx.compile_fx_inner",
        "torch._functorch.config.enable_autograd_cache",
    ),
      without="settings hold for the forward pass of compiled code alone")
def compile_graph(
    module: fx.GraphModule, examples: Sequence[Any], patches: Mapping[str, Any], around: Around | None
) -> Any:
    """Compile Dynamo's graph by Inductor; if given, `around` runs each compiled graph, forward or backward."""
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    if around is None:
        return compile_fx(module, examples, config_patches=dict(patches))

    def compile_inner(graph: fx.GraphModule, inputs: Sequence[Any], **how: Any) -> Any:
        compiled = compile_fx_inner(graph, inputs, **how)
        return as_boxed(lambda args: around(compiled, args))

    # Cached graphs were compiled without `around`.
    with torch._functorch.config.patch(enable_autograd_cache=False):
        return compile_fx(module, examples, inner_compile=compile_inner, config_patches=dict(patches))


def as_boxed(run: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Mark a function for AOTAutograd as one that takes its inputs as one list, which it may clear."""
    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def hold_address(node: fx.Node) -> None:
    """Mark a graph's input as static for CUDA graphs; a torch that does not know the mark ignores it."""
    node.meta.setdefault("tensor_dict", {})["_dynamo_static_input_type"] = "unguarded"


def _name_by_text(target: object) -> str | None:
    parts = str(target).split(".")
    known = len(parts) in (2, 3) and parts[0].isidentifier() and hasattr(torch.ops, parts[0])
    return f"{parts[0]}::{parts[1]}" if known else None


@need(_name_by_text, where=("torch._ops.OpOverload", "torch._ops.OpOverloadPacket"),
      without="operators are recognised by how they print")
def operator_name(target: object) -> str | None:
    """Return an operator's full name, "xlstm::mlstm_step", or None for something else."""
    if isinstance(target, torch._ops.OpOverload):
        target = target.overloadpacket
    if not isinstance(target, torch._ops.OpOverloadPacket):
        return None
    return target._qualified_op_name


def _no_trace(call: Callable[..., Any], examples: Sequence[Any]) -> fx.GraphModule | None:
    return None


@need(_no_trace, where=("torch.fx.experimental.proxy_tensor.make_fx",),
      without='backend="xlstm" keeps operators as calls and splices none')
def traced(call: Callable[..., Any], examples: Sequence[Any]) -> fx.GraphModule | None:
    """Trace a function on fake tensors to a graph of ATen calls; None if this torch cannot."""
    from torch.fx.experimental.proxy_tensor import make_fx

    graph: fx.GraphModule = make_fx(call)(*examples)
    return graph
