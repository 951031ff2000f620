"""Drop-ins: run the xLSTM models of other packages on our operators, and put everything back.

    handle = patch("transformers")      # or patch(): every supported package that is installed
    print("\n".join(handle.report()))
    ...
    handle.remove()                     # or: with patch("transformers"): ...

    handle = patch(model)               # the layers of this model alone

A drop-in replaces attributes of the peer's classes, never what an instance holds: models built before and after are
covered, pickles and deep copies hold nothing of ours, and removal leaves what was there. For one model, its layers are
marked and the classes ask for the mark. What Dynamo compiled beforehand has the old code inlined and does not guard on
it, so installing and removing reset `torch.compiler`.

Where a peer computes something wrong ours is right; `compat=True` repeats the peer's results instead.
One file a package: it offers ``changes(compat)``, and a row of `PEERS` names it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import itertools
import re
import sys
import warnings
import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple, Protocol, cast

import torch

from torch_xlstm_ops.patch.ledger import MARK, Change, Replaced, check, forget_compiled, hold, lock, release

__all__ = ["PEERS", "Change", "Handle", "Peer", "patch", "row"]


class Peer(NamedTuple):
    """A package we know how to patch."""

    drop_in: str  # our module, imported when asked for
    distribution: str  # what pip installs
    minimum: tuple[int, int]  # the oldest release we were tested with
    newest: tuple[int, int]  # and the newest
    seam: str  # the module of theirs after whose import everything that we replace is there

    @property
    def requirement(self) -> str:
        """What to hand to ``pip install``."""
        return f"{self.distribution}>={self.minimum[0]}.{self.minimum[1]}"


_HERE = "torch_xlstm_ops.patch"
PEERS = {
    "transformers": Peer(f"{_HERE}.transformers", "transformers", (5, 17), (5, 23),
                         "transformers.models.xlstm.modeling_xlstm"),
    "mlstm_kernels": Peer(f"{_HERE}.mlstm_kernels", "mlstm_kernels", (2, 0), (2, 0),
                          "mlstm_kernels.torch.backend_module"),
    "xlstm": Peer(f"{_HERE}.xlstm", "xlstm", (2, 0), (2, 0), "xlstm"),
    "flashrnn": Peer(f"{_HERE}.flashrnn", "flashrnn", (1, 0), (1, 0), "flashrnn"),
    "tirex": Peer(f"{_HERE}.tirex", "tirex-ts", (1, 4), (1, 4), "tirex"),
    "tirex2": Peer(f"{_HERE}.tirex2", "tirex-2", (0, 4), (0, 4), "tirex2"),
}

_tokens = itertools.count(1)
_warned: set[str] = set()


class Handle:
    """What one call of `patch` holds; the peers stay patched until every handle on them is removed."""

    def __init__(self, changes: Sequence[Change], compat: bool = False, model: torch.nn.Module | None = None) -> None:
        self._token = None if model is None else next(_tokens)
        with lock:
            self._held: Sequence[Replaced] = hold(changes, compat, self._token)
            self._marked = [] if model is None else _mark(model, changes, cast(int, self._token))
        self._removed = False

    def report(self) -> tuple[str, ...]:
        """Return one line for each attribute that this handle keeps replaced; nothing once it is removed."""
        if self._removed:
            return ()
        lines = []
        for one in self._held:
            owned = [m for m in (ref() for ref in self._marked) if m is not None and isinstance(m, _type(one.change))]
            where = "" if self._token is None else f" ({len(owned)} layers of one model)"
            lines.append(f"{one.change.name}{where}: {one.change.effect}")
        return tuple(lines)

    def remove(self) -> None:
        """Put back what nobody else holds. Doing so twice is safe.

        Raises RuntimeError, changing nothing, when somebody replaced one of our attributes in the meantime.
        """
        with lock:
            if self._removed:
                return
            release(self._held, self._token)
            for module in (ref() for ref in self._marked):
                if module is not None:
                    _unmark(module, cast(int, self._token))
            self._removed = True

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def patch(*targets: str | torch.nn.Module, compat: bool = False) -> Handle:
    """Make the named packages, or one model, run on our operators.

    targets: rows of `PEERS` or what pip calls them; or one model, whose layers alone are changed. Nothing means every
        package of the table that is installed; one of those that cannot be patched is left out with a warning.
    compat: repeat what a peer computes wrong, default false; the README has the table.
    Raises ValueError for a name we do not know or a model without xLSTM layers, ImportError for a package that is
    missing, RuntimeError for one that is too old, does not look as we know it, or is held with the other `compat`.
    Then nothing is changed.
    """
    models = [target for target in targets if isinstance(target, torch.nn.Module)]
    names = [target for target in targets if not isinstance(target, torch.nn.Module)]
    if len(models) > 1 or (models and names):
        raise ValueError(f"patch must get names of packages or one model, got {len(names)} names, {len(models)} models")
    if models:
        return Handle(_of_model(models[0], compat), compat, models[0])
    chosen = [row(name) for name in names]
    with lock:
        if names:
            return Handle([change for name in dict.fromkeys(chosen) for change in _changes(name, compat)], compat)
        return Handle(_of_all(compat), compat)


def row(name: str) -> str:
    """Return the row of `PEERS` for a package, by its own name or pip's. Raises ValueError for one we do not know."""
    by_any_name = {peer.distribution: row for row, peer in PEERS.items()} | {row: row for row in PEERS}
    if name not in by_any_name:
        raise ValueError(f"a package to patch must be one of {', '.join(PEERS)}, got {name!r}")
    return by_any_name[name]


class _DropIn(Protocol):
    def changes(self, compat: bool) -> Sequence[Change]: ...


def _of_all(compat: bool) -> list[Change]:
    installed = list(filter(_installed, PEERS))
    if not installed:
        wanted = " or ".join(f"pip install '{peer.requirement}'" for peer in PEERS.values())
        raise ImportError(f"there is nothing to patch: {wanted}")
    found: list[Change] = []
    failures: list[Exception] = []
    for name in installed:
        try:
            found += _changes(name, compat)
        except (ImportError, RuntimeError) as error:
            failures.append(error)
    if not found:
        raise RuntimeError(f"nothing could be patched: {'; '.join(map(str, failures))}") from failures[0]
    for failure in failures:
        warnings.warn(f"left as it is: {failure}", RuntimeWarning, stacklevel=4)
    return found


def _of_model(model: torch.nn.Module, compat: bool) -> list[Change]:
    """Return the changes that concern layers of the model, of whichever packages are imported."""
    imported = [name for name, peer in PEERS.items() if peer.seam in sys.modules]
    changes = [change for name in imported for change in _changes(name, compat)]
    types = {type(module) for module in model.modules()}
    concerned = [c for c in changes if any(issubclass(t, _type(c)) for t in types)]
    if not concerned:
        raise ValueError(f"a model to patch must have xLSTM layers of {', '.join(PEERS)}, got {type(model).__name__} "
                         "without")
    return concerned


def _type(change: Change) -> type:
    """Return the class of layers that a change concerns, or one that no layer has."""
    owner = change.owner
    return owner if isinstance(owner, type) and issubclass(owner, torch.nn.Module) else _NoLayer


class _NoLayer:
    pass


def _mark(model: torch.nn.Module, changes: Sequence[Change], token: int) -> list[weakref.ref[torch.nn.Module]]:
    classes = tuple(_type(change) for change in changes)
    layers = [module for module in model.modules() if isinstance(module, classes)]
    for layer in layers:
        vars(layer)[MARK] = (*vars(layer).get(MARK, ()), token)
    forget_compiled()
    return [weakref.ref(layer) for layer in layers]


def _unmark(layer: torch.nn.Module, token: int) -> None:
    left = tuple(other for other in vars(layer).get(MARK, ()) if other != token)
    if left:
        vars(layer)[MARK] = left
    else:
        vars(layer).pop(MARK, None)
    forget_compiled()


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # half-imported: the module is there without a spec
        return name in sys.modules


def _changes(name: str, compat: bool) -> list[Change]:
    """Return the changes of one package, each checked against what is installed."""
    peer = PEERS[name]
    newer = _check_version(name, peer)
    try:
        found = cast(_DropIn, importlib.import_module(peer.drop_in)).changes(compat)
    except (ImportError, AttributeError) as error:
        raise RuntimeError(f"{name} does not look as we know it: {error}") from error
    known = []
    for change in found:
        try:
            check(change)
        except RuntimeError as error:
            if not newer:
                raise
            warnings.warn(f"left as it is: {error}", RuntimeWarning, stacklevel=4)
            continue
        known.append(change)
    return known


def _check_version(name: str, peer: Peer) -> bool:
    """Say whether the package is newer than any that we were tested with, and warn of that once.

    Raises ImportError when it is missing, RuntimeError when it is too old.
    """
    if not _installed(name):
        raise ImportError(f"{name} is not installed: pip install '{peer.requirement}'")
    try:
        version = importlib.metadata.version(peer.distribution)
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"{name} is there but not installed: pip install '{peer.requirement}'") from None
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or (int(numbers[1]), int(numbers[2])) < peer.minimum:
        raise RuntimeError(f"{name} must be {peer.requirement}, got {version}: pip install '{peer.requirement}'")
    newer = (int(numbers[1]), int(numbers[2])) > peer.newest
    if newer and name not in _warned:
        _warned.add(name)
        warnings.warn(f"{name} {version} is newer than {peer.newest[0]}.{peer.newest[1]}, the newest we were tested "
                      "with: patching what looks as we know it", RuntimeWarning, stacklevel=5)
    return newer
