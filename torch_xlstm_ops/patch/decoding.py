"""Decoding: run a transformers block for one token as one compiled call.

For one token a block spends a third of its time between its Linear layers. Therefore the block's own forward is traced,
with the weights as arguments, and compiled once for all layers of the same kind. A trace has no guards: it is valid for
a block of unmodified upstream modules without hooks, until one of them, or an attribute that the trace read, becomes
another object. All other calls run the original.

The class's ``__call__`` is replaced, not its ``forward``: transformers compares the latter with its own to decide
whether to checkpoint gradients.
"""

from __future__ import annotations

import copy
import functools
import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch_xlstm_ops.patch.replacements import MARK
from torch_xlstm_ops.runtime import compiler, torch_internals
from torch_xlstm_ops.runtime.bounded_cache import BoundedCache
from torch_xlstm_ops.runtime.state import on_reset

EFFECT = "on the CPU a token without gradients is one compiled call, in a block of unmodified modules without hooks"
Result = tuple[Tensor, Sequence[Tensor]]
PLAIN = (nn.Linear, nn.SiLU, nn.Sigmoid)  # a trace reads only their tensors
KINDS = 64  # of blocks, whose traces are kept
UPSTREAM = ("transformers.models.xlstm.", "xlstm.xlstm_large.", "mlstm_kernels.torch.backend_module")


def block_call(original: Callable[..., Result]) -> Callable[..., Result]:
    """Return a block's ``__call__`` for a token without gradients on the CPU; other calls go to `original`."""

    @functools.wraps(original)
    def call(self: nn.Module, *args: Any, **options: Any) -> Result:
        if len(args) == 2 and not options and not self.training and _decodes(*args) and not _observed():
            block = _traced_block(self)
            tensors = [] if block is None else [args[0], *args[1], *block.weights()]
            run = None if block is None else block.compiled_for(tensors)
            if run is not None:
                h, *state = run(tensors)
                return h, tuple(state)
        return original(self, *args, **options)

    return call


def _decodes(x: Tensor, state: Sequence[Tensor] | None) -> bool:
    """Return whether this is one token, with a state and without gradients."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or state is None or type(x) is not Tensor:
        return False
    return x.is_cpu and x.dim() == 3 and x.shape[1] == 1 and not torch.is_autocast_enabled("cpu")


def _observed() -> bool:
    """Return whether a mode, a transform, a tracer or a global module hook observes the computation."""
    return torch_internals.watched() or torch_internals.global_hooks()


class _Block:
    """The modules and attributes of a block when it was traced.

    The weights of a layer flush the CPU's caches, so the check whether the block is unchanged reads few objects: the
    dicts of the modules, not the modules.
    """

    def __init__(self, parts: Sequence[nn.Module], forward: _Forward) -> None:
        configs = {id(c): c for c in map(_config, parts)}.values()
        read = [vars(owner) for owner in (*parts, *configs) if not isinstance(owner, PLAIN)]
        self._held = [(d, tuple(d.values())) for d in (*read, *(m._modules for m in parts if m._modules))]
        self._sizes = [(d, len(d)) for d in (vars(m) for m in parts if isinstance(m, PLAIN))]
        self._hooks = [hooks for m in parts for hooks in torch_internals.hooks(m)]
        self._classes = [(kind, kind.forward) for kind in {type(m) for m in parts}]
        self._weights = [m._parameters for m in parts if m._parameters]
        self._forward = forward
        self._latest: tuple[int, Callable[..., bool], compiler.RawCallable] | None = None

    def unchanged(self) -> bool:
        """Return whether the modules and attributes are the same objects, without hooks."""
        return (
            not any(self._hooks)
            and all(kind.forward is forward for kind, forward in self._classes)
            and all(len(d) == size for d, size in self._sizes)  # a forward set on an instance adds one
            and all(len(d) == len(held) and all(map(operator.is_, d.values(), held)) for d, held in self._held)
        )

    def weights(self) -> list[Tensor]:
        """Return the current weights."""
        return [w for d in self._weights for w in d.values() if w is not None]

    def compiled_for(self, tensors: list[Tensor]) -> compiler.RawCallable | None:
        """Return the callable for x, the state and the weights, or None if one is not a contiguous plain tensor."""
        threads = torch.get_num_threads()
        if self._latest is None or self._latest[0] != threads or not self._latest[1](*tensors):
            if not all(t.is_cpu and type(t) in (Tensor, nn.Parameter) and t.is_contiguous() for t in tensors):
                return None
            run = compiler.get(self._forward, [" ".join("abcd"[:t.dim()]) for t in tensors], tensors)
            if isinstance(run, compiler.Uncompiled):  # slower than the original
                return None
            like = torch_internals.like(tensors)
            self._latest = threads, like, run
        return self._latest[2]


_blocks: weakref.WeakKeyDictionary[nn.Module, _Block] = weakref.WeakKeyDictionary()
compiler.forget_with(_blocks.clear)
_forwards: BoundedCache[tuple[object, ...], _Forward] = BoundedCache(KINDS)  # by kind, for all layers and models
on_reset(_forwards.clear)


def _traced_block(module: nn.Module) -> _Block | None:
    """Return the traced block of a module, or None if it has hooks or other than unmodified upstream modules."""
    block = _blocks.get(module)
    if block is not None and block.unchanged():
        return block
    _blocks.pop(module, None)
    parts = list(module.modules())
    if not all(map(_traceable, parts)):
        return None
    kind = tuple(map(_kind, parts))
    forward = _forwards.get(kind) or _forwards.keep(kind, _Forward(module))
    return _blocks.setdefault(module, _Block(parts, forward))


def _traceable(module: nn.Module) -> bool:
    known = type(module) in PLAIN or type(module).__module__.startswith(UPSTREAM)
    modified = any(torch_internals.hooks(module)) or "forward" in vars(module)
    return known and not modified and not module._buffers


def _config(module: nn.Module) -> Any:
    return vars(module).get("config", module)


def _kind(module: nn.Module) -> tuple[object, ...]:
    """Return what a trace depends on in a module, except the sizes of its weights."""
    read = [] if isinstance(module, PLAIN) else [*vars(module).items(), *vars(_config(module)).items()]
    values = [(name, value) for name, value in read if value is None or type(value) in (bool, int, float, str)]
    weights = [(name, weight is None) for name, weight in module._parameters.items()]
    marks = vars(module).get(MARK)  # the traced copy runs on our operators while its handle does
    return type(module), type(module).forward.__code__, marks, *module._modules, *weights, *values


class _Forward:
    """The forward of all blocks of one kind, as a function of x, the state and the weights."""

    def __init__(self, block: nn.Module) -> None:
        self._names = [f"{path}.{name}" for path, m in block.named_modules() for name in m._parameters
                       if m._parameters[name] is not None]
        bare: dict[int, Any] = {id(w): nn.Parameter(w.to("meta"), requires_grad=False) for w in block.parameters()}
        self._block = copy.deepcopy(block, bare)

    def __call__(self, x: Tensor, c: Tensor, n: Tensor, m: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(self._names, weights, strict=True))
        h, state = torch.func.functional_call(self._block, named, (x, (c, n, m)), tie_weights=False)
        return h, *state
