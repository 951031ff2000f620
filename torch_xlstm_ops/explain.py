"""What ``torch.compile(model, backend="xlstm")`` makes of a model, as a text to read or to paste into a report."""

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
    calls: Sequence[str]  # one paragraph a call
    plans: Sequence[str]


def explain(
    model: Callable[..., Any], *inputs: Any, options: Mapping[str, Any] | None = None, **keywords: Any
) -> str:
    """Run a model once as the backend's Dynamo sees it, and say what takes the place of its xLSTM calls, and why not.

    inputs, keywords: what to call the model with; a state that it keeps moves on by one call.
    options: those of the backend, default none.
    Raises torch's BackendCompilerFailed, which quotes the reason, for options that the backend would refuse.
    """
    from torch_xlstm_ops.registrations import dynamo

    graphs: list[_Graph] = []

    def record(module: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(_look(module, dynamo.backend.read(options, None)))
        return module

    record.wants_xlstm_rules = True  # type: ignore[attr-defined]
    before = torch_internals.graph_breaks()
    with torch_internals.no_recompile_limit():  # each explanation is a compilation of the same code
        torch.compile(model, backend=record)(*inputs, **keywords)
    return "\n".join(_lines(graphs, torch_internals.graph_breaks() - before))


def _look(module: fx.GraphModule, options: Any) -> _Graph:
    """Describe a graph, which is changed as the backend would change it."""
    from torch_xlstm_ops.registrations import dynamo

    nodes = len(module.graph.nodes)
    called = [  # described before it is spliced away
        (node, name, _first_argument(node)) for node in module.graph.nodes if (name := dynamo.splice.operator_of(node))
    ]
    taken = iter([f for f in dynamo.rules.findings() if f.refusal is None])
    stay = dynamo.backend.prepare(module, options)
    calls = [_refused(f) for f in dynamo.rules.findings() if f.refusal is not None]
    plans = []
    for node, name, argument in called:
        finding = next(taken, None) if dynamo.rules.__file__ in node.meta.get("stack_trace", "") else None
        where = _where(finding.stack) if finding is not None else _last_frame(node.meta.get("stack_trace", ""))
        what = f"torch.ops.xlstm.{name}" + (", a call" if node in stay else ", spliced into the graph")
        calls.append(f"{finding.place if finding is not None else 'an operator, as written'}\n    at {where}\n"
                     f"    -> {what}, {argument}")
        if name == "mlstm_chunkwise" and node in stay:
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
    return f"{finding.place}\n    at {_where(finding.stack)}\n    stays as it is: {finding.refusal}"


def _where(stack: Sequence[str]) -> str:
    return stack[-1] if stack else "a place that Dynamo does not tell"


def _last_frame(trace: str) -> str:
    """Return the innermost frame of a stack trace, as Dynamo writes it, that is not ours."""
    frames = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ")]
    theirs = [frame for frame in frames if "torch_xlstm_ops" not in frame.split('"')[1]]
    return theirs[-1] if theirs else "a place that Dynamo does not tell"


def _first_argument(node: fx.Node) -> str:
    from torch_xlstm_ops.registrations import dynamo

    name, first = next(iter(dynamo.splice.arguments(node).items()))
    value = first.meta["example_value"]
    return f"{name} {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')} on {value.device.type}"


def _plan(node: fx.Node, options: Any) -> str:
    """Return the plan of a chunkwise call; sizes that Dynamo left symbolic stand at the values of this run."""
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
