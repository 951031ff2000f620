"""Modules of upstream packages as compiled functions of their inputs and weights.

A module's own forward is traced, with the weights as arguments, and compiled once for all modules of the same kind. A
trace has no guards: it is valid for unmodified upstream modules without hooks, until one of them, or an attribute that
the trace read, becomes another object.
"""

from __future__ import annotations

import copy
import functools
import operator
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from torch_xlstm_ops import config
from torch_xlstm_ops.maths.mlstm import write_state_
from torch_xlstm_ops.patch import kept_blocks
from torch_xlstm_ops.patch.projections import Projections
from torch_xlstm_ops.patch.replacements import MARK
from torch_xlstm_ops.runtime import compiler, torch_internals
from torch_xlstm_ops.runtime.bounded_cache import BoundedCache
from torch_xlstm_ops.runtime.cuda_graphs import FixedGraph
from torch_xlstm_ops.runtime.state import on_reset
from torch_xlstm_ops.runtime.uncompiled import Uncompiled

PLAIN = (nn.Linear, nn.SiLU, nn.Sigmoid)  # a trace reads only their tensors
KINDS = 64  # of modules, whose traces are kept
UPSTREAM = ("transformers.models.xlstm.", "xlstm.xlstm_large.", "mlstm_kernels.torch.backend_module")
_forward_of = operator.attrgetter("forward")
_is_given = functools.partial(operator.is_not, None)
_Latest = tuple[int, Callable[..., bool], compiler.RawCallable]


class Traced:
    """A module with its parts and attributes when it was traced.

    The weights of a layer flush the CPU's caches, so the check whether the module is unchanged reads few objects: the
    dicts of the parts, not the parts; and it runs for each token, so no line of Python runs for each of them.
    """

    def __init__(self, parts: Sequence[nn.Module], forward: Forward) -> None:
        configs = {id(c): c for c in map(_config, parts)}.values()
        read = [vars(owner) for owner in (*parts, *configs) if not isinstance(owner, PLAIN)]
        read += [m._modules for m in parts if m._modules]
        self._values, self._held = [d.values() for d in read], [value for d in read for value in d.values()]
        self._sized = [*read, *(vars(m) for m in parts if isinstance(m, PLAIN))]
        self._sizes = [len(d) for d in self._sized]
        self._hooks = [hooks for m in parts for hooks in torch_internals.hooks(m)]
        self._classes = list({type(m) for m in parts})
        self._forwards = [kind.forward for kind in self._classes]
        self._weights: list[Any] = [m._parameters.values() for m in parts if m._parameters]
        self.forward = forward
        self._latest: dict[bool, _Latest] = {}  # by in_place
        self._token = FixedGraph(allowed=config.cuda_graphs)

    def unchanged(self) -> bool:
        """Return whether the parts and attributes are the same objects, without hooks."""
        return (
            not any(self._hooks)
            and all(map(operator.is_, map(_forward_of, self._classes), self._forwards))
            and list(map(len, self._sized)) == self._sizes  # a forward set on an instance adds one
            and all(map(operator.is_, chain.from_iterable(self._values), self._held))
        )

    def run(self, inputs: Sequence[Tensor], *, in_place: bool = False) -> Sequence[Tensor] | None:
        """Return the results for inputs, or None if one of them or of the weights is not a contiguous plain tensor.

        in_place: write the new state over the old, which follows the first input, and return the other results.
        """
        tensors = [*inputs, *filter(_is_given, chain.from_iterable(self._weights))]
        threads, latest = torch.get_num_threads(), self._latest.get(in_place)
        if latest is None or latest[0] != threads or not latest[1](*tensors):
            latest = self._compile(tensors, threads, in_place)
            if latest is None:
                return None
            self._latest[in_place] = latest
        found = self._token.replay(latest[2], tensors) if in_place else None
        return latest[2](tensors) if found is None else found

    def _compile(self, tensors: list[Tensor], threads: int, in_place: bool) -> _Latest | None:
        device = tensors[0].device
        if not all(type(t) in (Tensor, nn.Parameter) and t.device == device and t.is_contiguous() for t in tensors):
            return None
        axes = [axes_of(tensors[0]), *(" ".join("abcd"[:t.dim()]) for t in tensors[1:])]
        run = compiler.get(self.forward, axes, tensors, join_in_place=device.type == "mps", in_place=in_place)
        if isinstance(run, Uncompiled):  # slower than the original
            return None
        return threads, torch_internals.like(tensors), run


_traced: weakref.WeakKeyDictionary[nn.Module, Traced] = weakref.WeakKeyDictionary()
compiler.forget_with(_traced.clear)
_forwards: BoundedCache[tuple[object, ...], Forward] = BoundedCache(KINDS)  # by kind, for all layers and models
on_reset(_forwards.clear)


def traced(module: nn.Module, device: str) -> Traced | None:
    """Return a module, traced for a kind of device; None if it has hooks or other than unmodified upstream parts."""
    found = _traced.get(module)
    if found is not None and found.forward.device == device and found.unchanged():
        return found
    _traced.pop(module, None)
    parts = list(module.modules())
    if not all(map(_traceable, parts)):
        return None
    kind = device, *map(_kind, parts)
    forward = _forwards.get(kind) or _forwards.keep(kind, Forward(module, device))
    return _traced.setdefault(module, Traced(parts, forward))


def axes_of(x: Tensor) -> str:
    """Return the axes of x (B, S, D) for `compiler.get`: the number of tokens stays symbolic, unless it is 1."""
    return "a b c" if x.shape[1] == 1 else "a G c"


def _traceable(module: nn.Module) -> bool:
    known = type(module) in PLAIN or type(module).__module__.startswith(UPSTREAM)
    modified = any(torch_internals.hooks(module)) or "forward" in vars(module)
    return known and not modified and not module._buffers


def _config(module: nn.Module) -> Any:
    return vars(module).get("config", module)


def _kind(module: nn.Module) -> tuple[object, ...]:
    """Return what a trace depends on in a module, except the sizes of its weights."""
    marks = vars(module).get(MARK)  # the traced copy runs on our operators while its handle does
    return type(module), type(module).forward.__code__, marks, *module._modules, *_weights(module), *_values(module)


def _values(module: nn.Module) -> list[tuple[str, object]]:
    read = [] if isinstance(module, PLAIN) else [*vars(module).items(), *vars(_config(module)).items()]
    return [(name, value) for name, value in read if value is None or type(value) in (bool, int, float, str)]


def _weights(module: nn.Module) -> list[tuple[str, bool]]:
    return [(name, weight is None) for name, weight in module._parameters.items()]


class Forward:
    """The forward of all modules of one kind, as a function of their inputs and weights.

    The inputs are those of a block, x and the state c, n, m, or x alone.
    """

    def __init__(self, module: nn.Module, device: str) -> None:
        self.device = device
        self._names = [f"{path}.{name}".lstrip(".") for path, m in module.named_modules() for name in m._parameters
                       if m._parameters[name] is not None]
        bare: dict[int, Any] = {id(w): nn.Parameter(w.to("meta"), requires_grad=False) for w in module.parameters()}
        self._module = copy.deepcopy(module, bare)
        self._projections = Projections(self._module) if device == "mps" else None

    def kept_as(self) -> str | None:
        """Return a name for what the kernel store keeps, or None if it cannot tell modules of this kind from others."""
        parts = list(self._module.modules())
        facts = [(vars(m).get(MARK, ()), [_values(m), list(m._modules), _weights(m)]) for m in parts]
        return kept_blocks.name([type(m) for m in parts], facts)

    def __call__(self, *tensors: Tensor, in_place: bool) -> tuple[Tensor, ...]:
        (x, *state), weights = tensors[:len(tensors) - len(self._names)], tensors[len(tensors) - len(self._names):]
        named, inputs = dict(zip(self._names, weights, strict=True)), (x, tuple(state)) if state else (x,)

        def run() -> Any:
            return torch.func.functional_call(self._module, named, inputs, tie_weights=False)

        with nullcontext() if self._projections is None else self._projections.joined(run):
            found = run()
        if not state:
            return (found,)
        h, new = found
        if not in_place:
            return h, *new
        write_state_(state, new)
        return (h,)
