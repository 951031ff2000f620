"""Replace the functions of `rules` while Dynamo traces them for our backend.

Dynamo stores a substitute per function object, for the whole process, and does not remove it. So while it is traced, a
substitute checks whether the graph is for our backend and whether the operator can replace the call. If not, Dynamo
traces a copy of the original: other backends compile the same code as without us.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
import warnings
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx

from torch_xlstm_ops.patch.upstream_functions import mlstm_sigmoid_inference
from torch_xlstm_ops.runtime import torch_internals
from torch_xlstm_ops.runtime.import_hook import when_imported

from . import rules
from .rules import Rule, TensorInfo, refusal

KERNEL = "mlstm_chunkwise_kernel"  # the argument of functions that wrap a kernel


class Finding(NamedTuple):
    """One traced call of a function that has a rule."""

    place: str
    refusal: str | None  # why the call is not replaced; None if it is
    stack: tuple[str, ...]  # "file:line in function", the innermost last


# By the graph that is being compiled.
_findings: weakref.WeakKeyDictionary[object, list[Finding]] = weakref.WeakKeyDictionary()


def findings() -> list[Finding]:
    """Return the findings in the graph that is being compiled."""
    return _findings.get(torch_internals.compile_key(), [])


def is_piece(module: fx.GraphModule) -> bool:
    """Return whether the graph that is being compiled is part of a frame that a graph break divided."""
    reason = getattr(module, "compile_subgraph_reason", None)
    return bool(reason and reason.graph_break) or torch_internals.frame().function.startswith("torch_dynamo_resume_in")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _for_our_backend() -> bool:
    """Return whether the graph is for a backend that uses the rules; Dynamo may have wrapped it."""
    backend = torch_internals.frame().compiler
    return hasattr(getattr(backend, "compiler_fn", backend), "wants_xlstm_rules")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _replaces(index: int, infos: tuple[TensorInfo, ...], conditions: tuple[object, ...]) -> bool:
    """Record a call of a rule's function, and return whether the operator replaces it."""
    rule = rules.RULES[index]
    reason = refusal(rule, infos, dict(zip(rule.conditions, conditions, strict=True)))
    stack = tuple(frame for frame in torch_internals.user_stack() if not frame.startswith(f"{__file__}:"))
    _findings.setdefault(torch_internals.compile_key(), []).append(Finding(rule.place, reason, stack))
    return reason is None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _sigmoid_gate(kernel: Any) -> bool | None:
    return rules.sigmoid_gate(kernel)


def _substitute(index: int, original: types.FunctionType) -> Callable[..., Any]:
    """Return the function that Dynamo traces for a call of `original`."""
    rule = rules.RULES[index]
    adapter, tensors, conditions = rule.adapter, tuple(rule.tensors.split()), rule.conditions
    wraps = KERNEL in conditions
    parameters = inspect.signature(original).parameters
    names = tuple(parameters)
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    copy = types.FunctionType(
        original.__code__, original.__globals__, original.__name__, original.__defaults__, original.__closure__
    )
    copy.__kwdefaults__ = original.__kwdefaults__

    def substitute(*args: Any, **kwargs: Any) -> Any:
        if _for_our_backend():
            given = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
            taken = [given[name] for name in tensors]
            infos = tuple(None if t is None else (t.dtype, t.dim()) for t in taken)
            others = tuple("a tensor" if isinstance(given[n], torch.Tensor) else given[n] for n in conditions)
            if _replaces(index, infos, others):
                normalize = _sigmoid_gate(given[KERNEL]) if wraps else None
                if normalize is not None:
                    return mlstm_sigmoid_inference(taken, {**given, "normalize": normalize})
                return adapter(taken, given)
        return copy(*args, **kwargs)

    return substitute


_installed: set[str] = set()


def install(module: str) -> None:
    """Give Dynamo the substitutes for an imported module.

    Skips a function that this release of the package lacks, and with a warning one that takes other arguments.
    """
    for index, rule in enumerate(rules.RULES):
        original = vars(sys.modules[module]).get(rule.function)
        if rule.module == module and rule.place not in _installed and isinstance(original, types.FunctionType):
            difference = _difference(rule, original)
            if difference is not None:
                warnings.warn(f"backend xlstm does not replace a function: {difference}", RuntimeWarning, stacklevel=2)
                continue
            _installed.add(rule.place)
            torch.compiler.substitute_in_graph(original)(_substitute(index, original))


def _difference(rule: Rule, original: types.FunctionType) -> str | None:
    """Return how a function differs from the one that the rule is for, or None."""
    parameters = inspect.signature(original).parameters
    missing = [name for name in (*rule.tensors.split(), *rule.conditions) if name not in parameters]
    if not missing:
        return None
    return f"{rule.place} must take {', '.join(missing)} to be replaced, got ({', '.join(parameters)})"


def watch() -> None:
    """Install the substitutes for every package that is imported, now or later."""
    for module in sorted({rule.module for rule in rules.RULES}):
        when_imported(module, functools.partial(install, module))
