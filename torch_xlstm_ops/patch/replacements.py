"""What is replaced, by whom and in which way: the record from which everything is put back.

An attribute is replaced once, however many handles hold it, and restored when the last of them lets go. A method may
be held for everybody or for marked instances alone; then a gate stands in its place, which looks at the mark.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple, cast

import torch

lock = threading.RLock()

Owner = type | ModuleType | dict[str, Any]
MARK = "_xlstm_ops_tokens"  # on a marked instance: the tokens of the handles that marked it
_MISSING = object()


class Change(NamedTuple):
    """One attribute, or one entry of a registry, to replace."""

    owner: Owner
    attribute: str
    build: Callable[[Any], object]  # from what was there, None for nothing, to what replaces it
    effect: str  # what a user sees, one phrase for the report
    parameters: tuple[str, ...] | None = None  # what the original must take for us to know it
    place: str | None = None  # how to call it in reports, if not by its owner's name
    beside: tuple[tuple[str, tuple[str, ...]], ...] = ()  # the owner's methods that ours calls, and what they must take

    @property
    def name(self) -> str:
        """Return the full name of what is replaced."""
        if self.place is not None:
            return self.place
        owner = cast("type | ModuleType", self.owner)
        prefix = owner.__name__ if isinstance(owner, ModuleType) else f"{owner.__module__}.{owner.__qualname__}"
        return f"{prefix}.{self.attribute}"


def check_signature(function: Callable[..., object], names: Sequence[str]) -> None:
    """Raise RuntimeError unless a peer's function takes exactly the parameters that our replacement takes."""
    found = list(inspect.signature(function).parameters)
    if found != list(names):
        place = f"{function.__module__}.{function.__qualname__}"
        raise RuntimeError(f"{place} must take ({', '.join(names)}) to be patched, got ({', '.join(found)})")


def check(change: Change) -> None:
    """Raise RuntimeError unless what is to be replaced looks as we know it."""
    known = [(change.attribute, _current(change), change.parameters)] if change.parameters is not None else []
    known += [(name, getattr(change.owner, name, None), parameters) for name, parameters in change.beside]
    for name, found, parameters in known:
        if not callable(found):
            raise RuntimeError(f"the owner of {change.name} must have {name} to be patched, got none")
        check_signature(found, parameters)


@dataclass
class Replaced:
    """An attribute that is not the peer's own now."""

    change: Change
    compat: bool
    original: Any  # what the owner itself had there
    peers: Any  # what answered to the name, inherited or not
    ours: Any
    standing: Any  # what is there now
    everyone: int = 0  # handles that replace it for everybody
    tokens: set[str] = field(default_factory=set)  # handles that replace it for the instances that they marked

    @functools.cached_property
    def gate(self) -> Any:
        """A method that runs ours for marked instances, and the peer's for the others."""
        ours, peers, tokens = self.ours, self.peers, self.tokens

        @functools.wraps(peers)
        def gate(instance: Any, *args: Any, **options: Any) -> Any:
            marked = any(token in tokens for token in getattr(instance, MARK, ()))
            return (ours if marked else peers)(instance, *args, **options)

        return gate


_replaced: dict[tuple[int, str], Replaced] = {}  # by owner's id and attribute; the record keeps the owner alive


def hold(changes: Sequence[Change], compat: bool, token: str | None = None) -> list[Replaced]:
    """Replace what is not replaced yet, for everybody or for the instances marked with a token.

    Raises RuntimeError when somebody holds it with the other `compat`, or replaced one of our attributes in the
    meantime. Whatever is raised, nothing is changed then.
    """
    with lock:
        chosen = {(id(change.owner), change.attribute): change for change in changes}
        for key in chosen.keys() & _replaced.keys():
            if _replaced[key].compat != compat:
                raise RuntimeError(f"{chosen[key].name} is held with compat={not compat}: remove that handle first")
        held = [_replaced.get(key) or _new(change, compat) for key, change in chosen.items()]
        _check_standing(held)
        _count(held, token, 1)
        try:
            _settle(held)
        except BaseException:
            _count(held, token, -1)
            _settle(held)
            raise
        return held


def release(held: Sequence[Replaced], token: str | None = None) -> None:
    """Let go of what `hold` returned for the same token, and put back what nobody else holds.

    Raises RuntimeError when somebody replaced one of our attributes in the meantime. Whatever is raised, nothing is
    changed then.
    """
    with lock:
        _check_standing(held)
        _count(held, token, -1)
        try:
            _settle(held)
        except BaseException:
            _count(held, token, 1)
            _settle(held)
            raise


def live_tokens() -> set[str]:
    """Return the tokens of the handles that hold something for marked instances."""
    with lock:
        return {token for one in _replaced.values() for token in one.tokens}


def _count(records: Sequence[Replaced], token: str | None, by: int) -> None:
    """Note that a handle holds the records, or no longer does."""
    for one in records:
        if token is None:
            one.everyone += by
        elif by > 0:
            one.tokens.add(token)
        else:
            one.tokens.discard(token)


def forget_compiled() -> None:
    """Drop Dynamo's compiled frames: they inlined the methods as they were."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _new(change: Change, compat: bool) -> Replaced:
    slot, peers = _slot(change), _current(change)
    return Replaced(change, compat, slot, peers, change.build(peers), standing=slot)


def _check_standing(records: Sequence[Replaced]) -> None:
    for one in records:
        if _slot(one.change) is not one.standing:
            raise RuntimeError(f"{one.change.name} was replaced by somebody else after patch(): undo that first")


def _settle(records: Sequence[Replaced]) -> None:
    """Put in place what the holders of each record ask for."""
    changed = False
    for one in records:
        key = id(one.change.owner), one.change.attribute
        held = one.everyone > 0 or bool(one.tokens)
        wanted = one.ours if one.everyone else one.gate if held else one.original
        if wanted is not one.standing:
            changed = True
            _put(one.change, wanted)
            one.standing = wanted
        if held:
            _replaced[key] = one
        else:
            _replaced.pop(key, None)
    if changed:
        forget_compiled()


def _namespace(change: Change) -> Any:
    return change.owner if isinstance(change.owner, dict) else vars(change.owner)


def _slot(change: Change) -> Any:
    """Return what the owner itself has there, or _MISSING."""
    return _namespace(change).get(change.attribute, _MISSING)


def _current(change: Change) -> Any:
    """Return what answers to the name, inherited or not, or None."""
    return _namespace(change).get(change.attribute, getattr(change.owner, change.attribute, None))


def _put(change: Change, value: Any) -> None:
    if isinstance(change.owner, dict):
        if value is _MISSING:
            del change.owner[change.attribute]
        else:
            change.owner[change.attribute] = value
    elif value is _MISSING:
        delattr(change.owner, change.attribute)
    else:
        setattr(change.owner, change.attribute, value)
