"""Drop-ins: run the xLSTM models of other packages on our operators, and put everything back.

    handle = patch("transformers")      # or patch(): every supported package that is installed
    print("\n".join(handle.report()))
    ...
    handle.remove()                     # or: with patch("transformers"): ...

    handle = patch(model)               # the layers of this model alone

A drop-in replaces attributes of the peer's classes, never what an instance holds: models built before and after are
covered, pickles and deep copies hold nothing of ours, and removal leaves what was there. For one model, its layers are
marked with the handle's token, a string, and the classes ask for it. A copy has the mark, and is patched as long as the
model is; in another process, and after removal, the mark means nothing. What Dynamo compiled beforehand has the old
code inlined and does not guard on it, so installing and removing reset `torch.compiler`.

Where a peer computes something wrong ours is right; `compat=True` repeats the peer's results instead.
One file a package: it offers ``changes(compat)``, and a row of `upstream.PEERS` names it.
"""

from __future__ import annotations

import importlib
import sys
import uuid
import warnings
import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, cast

import torch

from torch_xlstm_ops.patch import upstream
from torch_xlstm_ops.patch.checkpoints import convert_slstm_state_dict
from torch_xlstm_ops.patch.replacements import (
    MARK,
    Change,
    Replaced,
    check,
    forget_compiled,
    hold,
    live_tokens,
    lock,
    release,
)
from torch_xlstm_ops.patch.upstream import PEERS, Peer, row

__all__ = ["PEERS", "Change", "Handle", "Peer", "convert_slstm_state_dict", "patch", "row"]

_warned: set[str] = set()


class Handle:
    """What one call of `patch` holds; the peers stay patched until every handle on them is removed."""

    def __init__(self, changes: Sequence[Change], compat: bool = False, model: torch.nn.Module | None = None) -> None:
        # No other handle has the token, in whichever process: a mark may get there in a pickled layer.
        self._token = None if model is None else uuid.uuid4().hex
        with lock:
            self._held: Sequence[Replaced] = hold(changes, compat, self._token)
            try:
                self._marked = [] if model is None else _mark(model, changes, cast(str, self._token))
            except BaseException:
                release(self._held, self._token)
                raise
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
                    _unmark(module, cast(str, self._token))
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
            return Handle(_of_names(list(dict.fromkeys(chosen)), compat), compat)
        return Handle(_of_all(compat), compat)


class _DropIn(Protocol):
    def changes(self, compat: bool) -> Sequence[Change]: ...


def _of_all(compat: bool) -> list[Change]:
    installed = list(filter(upstream.installed, upstream.PEERS))
    if not installed:
        wanted = " or ".join(f"pip install '{peer.requirement}'" for peer in upstream.PEERS.values())
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
    changes = _of_names([name for name, peer in upstream.PEERS.items() if peer.seam in sys.modules], compat)
    types = {type(module) for module in model.modules()}
    concerned = [c for c in changes if any(issubclass(t, _type(c)) for t in types)]
    if not concerned:
        raise ValueError(f"a model to patch must have xLSTM layers of {', '.join(upstream.PEERS)}, got "
                         f"{type(model).__name__} without")
    return concerned


def _type(change: Change) -> type:
    """Return the class of layers that a change concerns, or one that no layer has."""
    owner = change.owner
    return owner if isinstance(owner, type) and issubclass(owner, torch.nn.Module) else _NoLayer


class _NoLayer:
    pass


def _mark(model: torch.nn.Module, changes: Sequence[Change], token: str) -> list[weakref.ref[torch.nn.Module]]:
    classes = tuple(_type(change) for change in changes)
    layers = [module for module in model.modules() if isinstance(module, classes)]
    live = live_tokens()
    for layer in layers:
        vars(layer)[MARK] = (*(other for other in vars(layer).get(MARK, ()) if other in live), token)
    forget_compiled()
    return [weakref.ref(layer) for layer in layers]


def _unmark(layer: torch.nn.Module, token: str) -> None:
    left = tuple(other for other in vars(layer).get(MARK, ()) if other != token)
    if left:
        vars(layer)[MARK] = left
    else:
        vars(layer).pop(MARK, None)
    forget_compiled()


def _of_names(names: Sequence[str], compat: bool) -> list[Change]:
    found: list[Change] = []
    for name in names:
        found += _changes(name, compat)
    return found


def _changes(name: str, compat: bool) -> list[Change]:
    """Return the changes of one package, each checked against what is there.

    Of a release that we were tested with, all must look as we know it. Of another, what looks different is left as it
    is with a warning.
    """
    peer, tested = upstream.PEERS[name], upstream.is_tested(name)
    try:
        found = cast(_DropIn, importlib.import_module(peer.drop_in)).changes(compat)
    except (ImportError, AttributeError) as error:
        raise RuntimeError(f"{name} does not look as we know it: {error}") from error
    known, unlike = [], []
    for change in found:
        try:
            check(change)
        except RuntimeError as error:
            if tested:
                raise
            unlike.append(str(error))
        else:
            known.append(change)
    if unlike:
        _tell_of(unlike, f"{name} {upstream.found(name)}", peer.tested, nothing_left=not known)
    return known


def _tell_of(unlike: Sequence[str], package: str, tested: str, *, nothing_left: bool) -> None:
    """Warn once of what a release that we were not tested with has otherwise. Raises RuntimeError if that is all."""
    differences = "; ".join(unlike)
    if nothing_left:
        raise RuntimeError(f"{package} does not look as we know {tested}: {differences}")
    message = f"{package} differs from {tested}, which we were tested with, and is left as it is there: {differences}"
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=5)
