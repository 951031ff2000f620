"""Inline an operator's mathematics into a graph, so that Inductor fuses it with the surrounding operations.

This happens before autograd, so training differentiates the inlined mathematics.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from torch_xlstm_ops import config
from torch_xlstm_ops.maths import aten, mlstm
from torch_xlstm_ops.ops.table import OPERATORS
from torch_xlstm_ops.runtime import torch_internals
from torch_xlstm_ops.schedules import defaults, plan

Maths = Callable[..., tuple[Tensor, ...]]


def _mlstm_chunkwise(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor,
    c: Tensor | None = None, n: Tensor | None = None, m: Tensor | None = None,
    *, chunk_size: int | None = None, schedule: str | None = None, eps: float = 1e-6,
) -> tuple[Tensor, ...]:
    """Run segments of all heads, one after another: the operator without bands."""
    B, NH, S, DHQK = q.shape
    settings, kind = config.for_call(chunk_size=chunk_size), q.device.type
    L = plan.make(plan.Shape(B * NH, S, DHQK, v.shape[-1]), kind, settings).chunk_size
    state = (c, n, m)
    return aten.mlstm_chunkwise(
        q, k, v, igate, fgate, *state, chunk_size=L, eps=eps, chunks=defaults.max_chunks(kind)
    )


MATHS: dict[str, Maths] = {
    "mlstm_step": mlstm.step, "mlstm_step_": mlstm.step_, "mlstm_chunkwise": _mlstm_chunkwise,
    "slstm_step": aten.slstm_step,
}
# Chunk summaries up to this size fit a CPU's cache without the operator's bands; then fusion gains more, about a fifth
# of a model's time (2 blocks of width 512, 512 tokens).
CACHED_BYTES = 4 << 20


def operator_of(node: fx.Node) -> str | None:
    """Return the name of our operator that a node calls, or None."""
    if node.op != "call_function":
        return None
    library, _, name = (torch_internals.operator_name(node.target) or "").partition("::")
    return name if library == "xlstm" else None


def arguments(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of a call of one of our operators, by the schema's names."""
    bound = OPERATORS[str(operator_of(node))].signature.bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return bound.arguments


def example(node: fx.Node, name: str) -> Tensor:
    """Return the fake tensor of an argument of one of our operators."""
    tensor: Tensor = arguments(node)[name].meta["example_value"]
    return tensor


def is_faster_inlined(node: fx.Node, name: str) -> bool:
    """Return whether a call is faster inlined: any step, and on the CPU a short sequence without gradients."""
    if name != "mlstm_chunkwise":
        return True
    values = [a.meta["example_value"] for a in arguments(node).values() if isinstance(a, fx.Node)]
    settings = config.for_call(schedule=arguments(node)["schedule"])
    if settings.schedule is not config.Schedule.AUTO:  # a schedule was chosen
        return False
    if values[0].device.type != "cpu" or _requires_grad(values) or any(map(_symbolic, values)):
        return False
    (B, NH, S, DHQK), DHHV = example(node, "q").shape, example(node, "v").shape[-1]
    chunks = -(-S // plan.make(plan.Shape(B * NH, S, DHQK, DHHV), "cpu", settings).chunk_size)
    return 4 * B * NH * chunks * DHQK * DHHV <= CACHED_BYTES


def splice(module: fx.GraphModule, chosen: Callable[[fx.Node, str], bool]) -> list[fx.Node]:
    """Replace the chosen calls of our operators by their mathematics, if in MATHS; return the remaining calls.

    A call remains if autocast would change its dtypes; one over a sequence also if a size is symbolic or CUDA's product
    with a wider result would have to be differentiated; a step in place if autograd records, so that the operator
    raises its error.
    """
    stay = []
    for node in list(module.graph.nodes):
        name = operator_of(node)
        if name is None:
            continue
        if not (name in MATHS and chosen(node, name) and _splice(module.graph, node, MATHS[name])):
            stay.append(node)
    module.recompile()
    return stay


def _splice(graph: fx.Graph, node: fx.Node, maths: Maths) -> bool:
    given = {name: value for name, value in arguments(node).items() if value is not None}
    if not given.keys() <= inspect.signature(maths).parameters.keys():  # the inlined form lacks an argument
        return False
    values = [value for value in given.values() if isinstance(value, fx.Node)]
    body = _trace(node, maths, given, values)
    if body is None:
        return False
    with graph.inserting_before(node):
        copies = dict(zip(body.graph.find_nodes(op="placeholder"), values, strict=True))
        results: Any = graph.graph_copy(body.graph, copies)
    for user in list(node.users):
        if user.target is operator.getitem:
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
    if node.users:  # mlstm_step_ returns one tensor
        node.replace_all_uses_with(results[0])
    graph.erase_node(node)
    return True


def _trace(
    node: fx.Node, maths: Maths, given: Mapping[str, Any], values: list[fx.Node]
) -> fx.GraphModule | None:
    """Return the graph of `maths` for a call's tensors, or None if its results would differ from the call's."""
    examples = [value.meta["example_value"] for value in values]

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        own = dict(zip(values, tensors, strict=True))
        return maths(**{name: own[value] if isinstance(value, fx.Node) else value for name, value in given.items()})

    wider = examples[0].is_cuda and examples[0].dtype in (torch.float16, torch.bfloat16)
    if maths is _mlstm_chunkwise and (any(map(_symbolic, examples)) or (wider and _requires_grad(examples))):
        return None
    if maths is mlstm.step_ and _requires_grad(examples):
        return None
    with examples[0].fake_mode, torch.no_grad():
        body = torch_internals.traced(call, examples)
        if body is None:
            return None
        returned: Any = body.graph.output_node().args[0]
    wanted = node.meta["example_value"]
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    same = all(a.meta["val"].dtype == b.dtype for a, b in zip(returned, wanted, strict=True))
    return body if same else None


def _requires_grad(examples: list[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in examples)


def _symbolic(t: Tensor) -> bool:
    return any(isinstance(size, torch.SymInt) for size in t.shape)
