"""Explain, as text, what ``torch.compile(model, backend="xlstm")`` replaces in a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

import torch_xlstm_ops
from torch_xlstm_ops import config
from torch_xlstm_ops.runtime import torch_internals
from torch_xlstm_ops.schedules import plan, tuned
from torch_xlstm_ops.schedules.machine import machine


class _Graph(NamedTuple):
    nodes: int
    calls: Sequence[str]  # one paragraph per call
    plans: Sequence[str]


def explain(
    model: Callable[..., Any], *inputs: Any, options: Mapping[str, Any] | None = None, **keywords: Any
) -> str:
    """Trace a model with Dynamo and describe which of its xLSTM calls are replaced, by which operator, or why not.

    inputs, keywords: the arguments of the model, which runs once: a state that it keeps advances by one call.
    options: of the backend, default none.
    Raises torch's BackendCompilerFailed, which quotes the reason, for options that the backend would refuse.
    """
    from torch_xlstm_ops.registrations import dynamo

    graphs: list[_Graph] = []

    def record(module: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(_describe(module, dynamo.backend.parse_options(options, None)))
        return module

    record.wants_xlstm_rules = True  # type: ignore[attr-defined]
    before = torch_internals.graph_breaks()
    with torch_internals.no_recompile_limit():  # each call compiles the same code again
        torch.compile(model, backend=record)(*inputs, **keywords)
    return "\n".join(_lines(graphs, torch_internals.graph_breaks() - before))


def _describe(module: fx.GraphModule, options: Any) -> _Graph:
    """Describe a graph; modifies it as the backend would."""
    from torch_xlstm_ops.registrations import dynamo

    nodes = len(module.graph.nodes)
    called = [  # described before they are inlined
        (node, name, _first_argument(node)) for node in module.graph.nodes if (name := dynamo.splice.operator_of(node))
    ]
    replaced = iter([f for f in dynamo.substitution.findings() if f.refusal is None])
    remaining = dynamo.backend.prepare(module, options)
    calls = [_refused(f) for f in dynamo.substitution.findings() if f.refusal is not None]
    plans = []
    for node, name, argument in called:
        finding = next(replaced, None) if dynamo.substitution.__file__ in node.meta.get("stack_trace", "") else None
        where = _location(finding.stack) if finding is not None else _last_frame(node.meta.get("stack_trace", ""))
        what = f"torch.ops.xlstm.{name}" + (", a call" if node in remaining else ", inlined into the graph")
        calls.append(f"{finding.place if finding is not None else 'our operator'}\n    at {where}\n"
                     f"    -> {what}, {argument}")
        if name == "mlstm_chunkwise" and node in remaining:
            plans.append(_plan(node, options))
    return _Graph(nodes, calls, plans)


def _lines(graphs: Sequence[_Graph], breaks: Mapping[str, int]) -> list[str]:
    lines = [f"torch_xlstm_ops {torch_xlstm_ops.__version__}, torch {torch.__version__}: "
             f"{_count(len(graphs), 'graph')}, {_count(sum(breaks.values()), 'graph break')}"]
    for number, graph in enumerate(graphs):
        lines.append(f"graph {number}: {_count(graph.nodes, 'node')}")
        lines += [f"  {times} x {call}" for call, times in Counter(graph.calls).items()] or ["  no xLSTM found"]
    lines += [f"graph break, {times} x: {reason.strip().splitlines()[0]}" for reason, times in breaks.items()]
    for text in dict.fromkeys(text for graph in graphs for text in graph.plans):
        lines += ["plan", *(f"  {line}" for line in text.splitlines())]
    return [line.rstrip() for line in lines]


def _refused(finding: Any) -> str:
    return f"{finding.place}\n    at {_location(finding.stack)}\n    is not replaced: {finding.refusal}"


def _location(stack: Sequence[str]) -> str:
    return stack[-1] if stack else "an unknown location"


def _last_frame(trace: str) -> str:
    """Return the innermost frame of Dynamo's stack trace outside this package."""
    frames = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ")]
    others = [frame for frame in frames if "torch_xlstm_ops" not in frame.split('"')[1]]
    return others[-1] if others else "an unknown location"


def _first_argument(node: fx.Node) -> str:
    from torch_xlstm_ops.registrations import dynamo

    name, first = next(iter(dynamo.splice.arguments(node).items()))
    value = first.meta["example_value"]
    return f"{name} {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')} on {value.device.type}"


def _plan(node: fx.Node, options: Any) -> str:
    """Return the plan of a chunkwise call; symbolic sizes have the values of this run."""
    from torch_xlstm_ops.registrations import dynamo

    q, v = dynamo.splice.example(node, "q"), dynamo.splice.example(node, "v")
    B, NH, S, DHQK, DHHV = (_size(s) for s in (*q.shape, v.shape[-1]))
    with config.use(**options.settings):
        settings = config.for_call(chunk_size=node.kwargs.get("chunk_size"))  # type: ignore[arg-type]
    shape = plan.Shape(B * NH, S, DHQK, DHHV)
    settings = tuned.apply_tuned(settings, shape, q.device, q.dtype, training=q.requires_grad)
    return str(plan.make(shape, q.device.type, settings, machine(q.device)))


def _size(size: Any) -> int:
    return int(size) if isinstance(size, int) else int(size.node.hint)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
