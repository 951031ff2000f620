"""Drop-ins: run the xLSTM models of other packages on our operators, and put everything back.

    handle = patch("transformers")      # or patch(): every supported package that is installed
    print("\\n".join(handle.report()))
    ...
    handle.remove()                     # or: with patch("transformers"): ...

A drop-in replaces attributes of the peer's classes and never touches an instance: models built before and after are
covered, pickles and deep copies hold nothing of ours, and removal leaves what was there. What Dynamo compiled
beforehand has the old code inlined and does not guard on it, so installing and removing reset `torch.compiler`.

One file a package: it offers ``changes()``, and a row of `PEERS` names it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import NamedTuple, Protocol, cast

import torch

__all__ = ["PEERS", "Change", "Handle", "Peer", "patch"]


class Peer(NamedTuple):
    """A package we know how to patch."""

    drop_in: str  # our module, imported when asked for
    distribution: str  # what pip installs
    minimum: tuple[int, int]  # the oldest release we were tested with

    @property
    def requirement(self) -> str:
        """What to hand to ``pip install``."""
        return f"{self.distribution}>={self.minimum[0]}.{self.minimum[1]}"


PEERS = {
    "transformers": Peer("torch_xlstm_ops.patch.transformers", "transformers", (5, 17)),
    "mlstm_kernels": Peer("torch_xlstm_ops.patch.mlstm_kernels", "mlstm_kernels", (2, 0)),
}


class Change(NamedTuple):
    """One attribute to replace."""

    owner: type | ModuleType
    attribute: str
    replacement: object
    effect: str  # what a user sees, one phrase for the report


class Handle:
    """What one call of `patch` holds; the peers stay patched until every handle on them is removed."""

    def __init__(self, changes: Sequence[Change]) -> None:
        self._held = _hold(changes)
        self._removed = False

    def report(self) -> tuple[str, ...]:
        """Return one line for each attribute that this handle keeps replaced; nothing once it is removed."""
        return () if self._removed else tuple(f"{one.place}: {one.change.effect}" for one in self._held)

    def remove(self) -> None:
        """Put back what nobody else holds. Doing so twice is safe.

        Raises RuntimeError, changing nothing, when somebody replaced one of our attributes in the meantime.
        """
        with _lock:
            if not self._removed:
                _release(self._held)
                self._removed = True

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def patch(*names: str) -> Handle:
    """Make the named packages run on our operators, or every supported package that is installed.

    names: rows of `PEERS`; none means all that are installed.
    Raises ValueError for a name we do not know, ImportError for a package that is missing, RuntimeError for one that
    is too old or does not look as we know it. Then nothing is patched.
    """
    for name in names:
        if name not in PEERS:
            raise ValueError(f"a package to patch must be one of {', '.join(PEERS)}, got {name!r}")
    chosen = dict.fromkeys(names or filter(_installed, PEERS))
    if not chosen:
        wanted = " or ".join(f"pip install '{peer.requirement}'" for peer in PEERS.values())
        raise ImportError(f"there is nothing to patch: {wanted}")
    with _lock:
        return Handle([change for name in chosen for change in _changes(name)])


class _DropIn(Protocol):
    def changes(self) -> Sequence[Change]: ...


@dataclass
class _Replaced:
    change: Change
    original: object
    holders: int = 0

    @property
    def place(self) -> str:
        owner = self.change.owner
        prefix = owner.__name__ if isinstance(owner, ModuleType) else f"{owner.__module__}.{owner.__qualname__}"
        return f"{prefix}.{self.change.attribute}"


_MISSING = object()
_lock = threading.RLock()
_replaced: dict[tuple[int, str], _Replaced] = {}  # by owner's id and attribute; the record keeps the owner alive


def _hold(changes: Sequence[Change]) -> list[_Replaced]:
    with _lock:
        before = len(_replaced)
        held: dict[tuple[int, str], _Replaced] = {}
        for change in changes:
            key = (id(change.owner), change.attribute)
            if key not in _replaced:
                _replaced[key] = _Replaced(change, vars(change.owner).get(change.attribute, _MISSING))
                setattr(change.owner, change.attribute, change.replacement)
            held[key] = _replaced[key]
        for one in held.values():
            one.holders += 1
        if len(_replaced) > before:
            _forget_compiled()
        return list(held.values())


def _release(held: Sequence[_Replaced]) -> None:
    last = [one for one in held if one.holders == 1]
    for one in last:
        if vars(one.change.owner).get(one.change.attribute) is not one.change.replacement:
            raise RuntimeError(f"{one.place} was replaced by somebody else after patch(): undo that first")
    for one in held:
        one.holders -= 1
    for one in last:
        if one.original is _MISSING:
            delattr(one.change.owner, one.change.attribute)
        else:
            setattr(one.change.owner, one.change.attribute, one.original)
        del _replaced[id(one.change.owner), one.change.attribute]
    if last:
        _forget_compiled()


def _forget_compiled() -> None:
    """Drop Dynamo's compiled frames: they inlined the methods as they were."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # half-imported: the module is there without a spec
        return name in sys.modules


def _changes(name: str) -> Sequence[Change]:
    peer = PEERS[name]
    if not _installed(name):
        raise ImportError(f"{name} is not installed: pip install '{peer.requirement}'")
    version = importlib.metadata.version(peer.distribution)
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or (int(numbers[1]), int(numbers[2])) < peer.minimum:
        raise RuntimeError(f"{name} must be {peer.requirement}, got {version}: pip install '{peer.requirement}'")
    return cast(_DropIn, importlib.import_module(peer.drop_in)).changes()
