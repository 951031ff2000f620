"""What the Dynamo backend recognises: a table of the peers' xLSTM functions, and what takes the place of each.

Dynamo keeps a substitute by function object, for the whole process and for good. So a substitute asks, while Dynamo
traces it, whether the graph is made for a backend that wants it, and whether the operator promises what the call asks.
If not, a copy of the original is traced instead: other backends see the code that they always saw.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from torch_xlstm_ops.maths.shapes import STREAM_DTYPES
from torch_xlstm_ops.patch import upstream_functions as functions
from torch_xlstm_ops.runtime import torch_internals
from torch_xlstm_ops.runtime.import_hook import when_imported

Fact = tuple[torch.dtype, int] | None  # of an argument: dtype and rank; None where no tensor was given


class Rule(NamedTuple):
    """One function of a peer."""

    module: str  # where it is defined
    function: str
    adapter: Callable[[Sequence[Any], Mapping[str, Any]], Any]
    tensors: str  # the peer's names of the tensors that the adapter takes, in its order
    ranks: tuple[int, ...]
    streams: int  # how many of them must share a dtype; the rest need only be floating
    judged: tuple[str, ...] = ()  # the other arguments that decide

    @property
    def place(self) -> str:
        """Return the name that users know it by."""
        return f"{self.module}.{self.function}"


_HF, _HF_STREAMS = "transformers.models.xlstm.modeling_xlstm", "query key value igate fgate"
_MK, _MK_STREAMS = "mlstm_kernels.torch", "q k v i f"
_INITIAL = " c_initial n_initial m_initial"
_BLOCKS, _CELL = "xlstm.blocks.mlstm.backends", "xlstm.blocks.slstm.src.vanilla"
_GATES = "igate_preact fgate_preact"


def _sequence(module: str, function: str, streams: str, *judged: str) -> Rule:
    """An mLSTM over (B, NH, S, D), its state by the names that transformers and mlstm_kernels share."""
    ranks = (4, 4, 4, 3, 3, 4, 3, 3)
    return Rule(module, function, functions.mlstm_sequence, streams + _INITIAL, ranks, 3, ("eps", *judged))


def _token(module: str, function: str, tensors: str) -> Rule:
    ranks = (3, 3, 3, 3, 3, 4, 3, 3)
    return Rule(module, function, functions.mlstm_token, tensors, ranks, 3, ("eps", "dtype_state"))


RULES = (
    _sequence(_HF, "wrap_chunkwise_arbitrary_sequence_length", _HF_STREAMS, "mlstm_chunkwise_kernel"),
    _sequence(_HF, "mlstm_chunkwise_native_autograd", _HF_STREAMS),
    _sequence(_HF, "mlstm_recurrent_sequence_native", _HF_STREAMS, "dtype_state"),
    _token(_HF, "mlstm_recurrent_step_native", _HF_STREAMS + " cstate nstate mstate"),
    _sequence(_MK + ".kernel_wrappers", "wrap_chunkwise__arbitrary_sequence_length", _MK_STREAMS,
              "mlstm_chunkwise_kernel"),
    _sequence(_MK + ".kernel_wrappers", "wrap_chunkwise__arbitrary_sequence_length_with_padding", _MK_STREAMS,
              "mlstm_chunkwise_kernel"),
    _sequence(_MK + ".chunkwise.native.fwbw", "mlstm_chunkwise__native_autograd", _MK_STREAMS),
    _sequence(_MK + ".chunkwise.native.fwbw", "mlstm_chunkwise__native_custbw", _MK_STREAMS),
    _sequence(_MK + ".recurrent.native_sequence", "mlstm_recurrent_sequence__native_fw", _MK_STREAMS, "dtype_state"),
    _token(_MK + ".recurrent.native_step", "mlstm_recurrent_step__native", _MK_STREAMS + " c n m"),
    Rule(_BLOCKS, "parallel_stabilized_simple", functions.xlstm_parallel, "queries keys values " + _GATES, (4,) * 5, 3,
         ("eps", "stabilize_rowwise")),
    Rule(_BLOCKS, "recurrent_step_stabilized_simple", functions.xlstm_token, f"q k v {_GATES} c_state n_state m_state",
         (4,) * 8, 3, ("eps",)),
    Rule(_CELL, "slstm_forward", functions.xlstm_slstm, "x R b states", (3, 3, 1, 3), 2, ("pointwise_forward",)),
    Rule(_CELL, "slstm_forward_step", functions.xlstm_slstm_token, "x R b states", (3, 3, 1, 3), 2,
         ("pointwise_forward",)),
    Rule("flashrnn.flashrnn.vanilla", "flashrnn_forward", functions.flashrnn, "Wx R b states", (5, 4, 3, 5), 2,
         ("pointwise_forward",)),
)


# --- the judgement, as Dynamo traces: Python run for real, its results constants of the graph ---


class Finding(NamedTuple):
    """One call that a rule met."""

    place: str
    refusal: str | None  # why the call stays as it is; None where an operator takes it
    stack: tuple[str, ...]  # "file:line in function", the innermost last


# By the graph in the making.
_findings: weakref.WeakKeyDictionary[object, list[Finding]] = weakref.WeakKeyDictionary()


def findings() -> list[Finding]:
    """Return what the rules met in the graph that is being compiled."""
    return _findings.get(torch_internals.compile_key(), [])


def is_piece(module: fx.GraphModule) -> bool:
    """Return whether a graph break cut the graph that is being compiled from its frame's other graphs."""
    reason = getattr(module, "compile_subgraph_reason", None)
    return bool(reason and reason.graph_break) or torch_internals.frame().function.startswith("torch_dynamo_resume_in")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _wanted() -> bool:
    """Return whether the graph is made for a backend that wants the rules; Dynamo wraps backends, ours lies within."""
    backend = torch_internals.frame().compiler
    return hasattr(getattr(backend, "compiler_fn", backend), "wants_xlstm_rules")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _takes(index: int, facts: tuple[Fact, ...], judged: tuple[object, ...]) -> bool:
    """Write a call of a rule's function down, and return whether the operator takes it."""
    rule = RULES[index]
    refusal = _refusal(rule, facts, dict(zip(rule.judged, judged, strict=True)))
    stack = tuple(frame for frame in torch_internals.user_stack() if not frame.startswith(f"{__file__}:"))
    _findings.setdefault(torch_internals.compile_key(), []).append(Finding(rule.place, refusal, stack))
    return refusal is None


def _refusal(rule: Rule, facts: Sequence[Fact], judged: Mapping[str, Any]) -> str | None:
    """Return why the operator does not promise a call, or None."""
    names = rule.tensors.split()
    stream = facts[0]
    for name, fact, rank in zip(names, facts, rule.ranks, strict=True):
        if fact is not None and fact[1] != rank:
            return f"{name} must have {rank} axes, got {fact[1]}"
        if fact is not None and not fact[0].is_floating_point:
            return f"{name} must have a floating dtype, got {_short(fact[0])}"
    found = [fact[0] if fact is not None else None for fact in facts[:rule.streams]]
    if found[0] not in STREAM_DTYPES or any(dtype != found[0] for dtype in found):
        return (f"{', '.join(names[:rule.streams])} must share one of float32, float16, bfloat16 and float64, got "
                f"{', '.join(map(_short, found))}")
    eps = judged.get("eps", 0.0)
    if not isinstance(eps, (float, int)) or not eps >= 0:
        return f"eps must be a number of at least 0, got {eps}"
    if judged.get("dtype_state") == torch.float64 and stream is not None and stream[0] != torch.float64:
        return f"dtype_state must be at most float32 beside {_short(stream[0])}, got float64"
    if not judged.get("stabilize_rowwise", True):
        return "stabilize_rowwise must be True, got False"
    return _another_recurrence(judged.get("mlstm_chunkwise_kernel"), judged.get("pointwise_forward"))


def _another_recurrence(kernel: Any, pointwise: Any) -> str | None:
    while isinstance(kernel, functools.partial):
        kernel = kernel.func
    if "siging" in getattr(kernel, "__name__", ""):
        return f"the input gate must be exponential, got {kernel.__name__}"
    if pointwise is not None and not pointwise.__module__.endswith(".slstm"):
        return f"pointwise_forward must be the sLSTM's, got that of {pointwise.__module__}"
    return None


def _short(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


# --- installation ---


def _substitute(index: int, original: types.FunctionType) -> Callable[..., Any]:
    """Return what Dynamo traces for a call of `original`."""
    rule = RULES[index]
    adapter, tensors, judged = rule.adapter, tuple(rule.tensors.split()), rule.judged
    parameters = inspect.signature(original).parameters
    names = tuple(parameters)
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    copy = types.FunctionType(
        original.__code__, original.__globals__, original.__name__, original.__defaults__, original.__closure__
    )
    copy.__kwdefaults__ = original.__kwdefaults__

    def substitute(*args: Any, **kwargs: Any) -> Any:
        if _wanted():
            given = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
            taken = [given[name] for name in tensors]
            facts = tuple(None if t is None else (t.dtype, t.dim()) for t in taken)
            others = tuple("a tensor" if isinstance(given[n], torch.Tensor) else given[n] for n in judged)
            if _takes(index, facts, others):
                return adapter(taken, given)
        return copy(*args, **kwargs)

    return substitute


_installed: set[str] = set()


def install(module: str) -> None:
    """Hand Dynamo the rules for an imported module.

    A function that this release of the peer lacks is passed over, one that takes other arguments with a warning.
    """
    for index, rule in enumerate(RULES):
        original = vars(sys.modules[module]).get(rule.function)
        if rule.module == module and rule.place not in _installed and isinstance(original, types.FunctionType):
            unlike = _unlike(rule, original)
            if unlike is not None:
                warnings.warn(f"the backend xlstm leaves it as it is: {unlike}", RuntimeWarning, stacklevel=2)
                continue
            _installed.add(rule.place)
            torch.compiler.substitute_in_graph(original)(_substitute(index, original))


def _unlike(rule: Rule, original: types.FunctionType) -> str | None:
    """Return how a peer's function differs from what the rule knows, or None."""
    parameters = inspect.signature(original).parameters
    missing = [name for name in (*rule.tensors.split(), *rule.judged) if name not in parameters]
    if not missing:
        return None
    return f"{rule.place} must take {', '.join(missing)} to be replaced, got ({', '.join(parameters)})"


def watch() -> None:
    """Install the rules of every peer that is imported, now or later."""
    for module in sorted({rule.module for rule in RULES}):
        when_imported(module, functools.partial(install, module))
