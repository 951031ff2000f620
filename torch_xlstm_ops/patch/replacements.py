"""Replace attributes of classes, modules and registries, and restore them: reference counts by handle.

An attribute is replaced once, however many handles hold it, and restored when the last handle releases it. A method is
held for all instances or for marked ones only; in the second case a gate method checks the mark of the instance.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple, cast

import torch

from torch_xlstm_ops.runtime import forks

lock = forks.new_rlock()

Owner = type | ModuleType | dict[str, Any]
MARK = "_xlstm_ops_tokens"  # on a marked instance: the tokens of the handles that marked it
_MISSING = object()


class Replacement(NamedTuple):
    """One attribute, or one entry of a registry, to replace."""

    owner: Owner
    attribute: str
    build: Callable[[Any], object]  # from the original, None if there is none, to what replaces it
    effect: str  # for the report, one phrase
    parameters: tuple[str, ...] | None = None  # of the original; None: not checked
    place: str | None = None  # its name in reports, if not made of the owner's name
    uses: tuple[tuple[str, tuple[str, ...]], ...] = ()  # methods of the owner that ours calls, and their parameters

    @property
    def name(self) -> str:
        """Return the full name of the attribute."""
        if self.place is not None:
            return self.place
        owner = cast("type | ModuleType", self.owner)
        prefix = owner.__name__ if isinstance(owner, ModuleType) else f"{owner.__module__}.{owner.__qualname__}"
        return f"{prefix}.{self.attribute}"

    @property
    def layer_class(self) -> type:
        """Return the class of layers whose method this is, or one without instances."""
        owner, method = self.owner, callable(_inherited(self))
        return owner if isinstance(owner, type) and issubclass(owner, torch.nn.Module) and method else _NoLayer


class _NoLayer:
    pass


def check_signature(function: Callable[..., object], names: Sequence[str]) -> None:
    """Raise RuntimeError unless a function takes exactly the parameters that our replacement takes."""
    found = list(inspect.signature(function).parameters)
    if found != list(names):
        place = f"{function.__module__}.{function.__qualname__}"
        raise RuntimeError(f"{place} must take ({', '.join(names)}) to be patched, got ({', '.join(found)})")


def check(replacement: Replacement) -> None:
    """Raise RuntimeError unless the original has the parameters that our replacement expects."""
    known = [(name, getattr(replacement.owner, name, None), parameters) for name, parameters in replacement.uses]
    if replacement.parameters is not None:
        known.insert(0, (replacement.attribute, _inherited(replacement), replacement.parameters))
    for name, found, parameters in known:
        if not callable(found):
            raise RuntimeError(f"the owner of {replacement.name} must have {name} to be patched, got none")
        check_signature(found, parameters)


@dataclass
class ActiveReplacement:
    """A replacement with the handles that hold it."""

    replacement: Replacement
    compat: bool
    original: Any  # the owner's own attribute, or _MISSING
    found: Any  # the attribute, inherited or not
    ours: Any
    current: Any  # the owner's own attribute now
    everyone: int = 0  # number of handles that replace it for all instances
    tokens: set[str] = field(default_factory=set)  # of the handles that replace it for marked instances

    @functools.cached_property
    def gate(self) -> Any:
        """A method that runs ours for marked instances, and the original for the others."""
        ours, found, tokens = self.ours, self.found, self.tokens

        @functools.wraps(found)
        def gate(instance: Any, *args: Any, **options: Any) -> Any:
            marked = any(token in tokens for token in getattr(instance, MARK, ()))
            return (ours if marked else found)(instance, *args, **options)

        return gate


_active: dict[tuple[int, str], ActiveReplacement] = {}  # by owner's id and attribute; the record keeps the owner alive


def hold(replacements: Sequence[Replacement], compat: bool, token: str | None = None) -> list[ActiveReplacement]:
    """Replace attributes that are not replaced yet, for all instances or for those marked with a token.

    Raises RuntimeError if a handle holds one with the other `compat`, or other code replaced one of ours meanwhile.
    After any exception nothing is changed.
    """
    with lock:
        chosen = {(id(replacement.owner), replacement.attribute): replacement for replacement in replacements}
        for key in chosen.keys() & _active.keys():
            if _active[key].compat != compat:
                raise RuntimeError(f"{chosen[key].name} is held with compat={not compat}: remove that handle first")
        held = [_active.get(key) or _new(replacement, compat) for key, replacement in chosen.items()]
        _check_current(held)
        _count(held, token, 1)
        try:
            _apply(held)
        except BaseException:
            _count(held, token, -1)
            _apply(held)
            raise
        return held


def release(held: Sequence[ActiveReplacement], token: str | None = None) -> None:
    """Release what `hold` returned for the same token, and restore what no other handle holds.

    Raises RuntimeError if other code replaced one of our attributes meanwhile. After any exception nothing is changed.
    """
    with lock:
        _check_current(held)
        _count(held, token, -1)
        try:
            _apply(held)
        except BaseException:
            _count(held, token, 1)
            _apply(held)
            raise


def live_tokens() -> set[str]:
    """Return the tokens of the handles that hold replacements for marked instances."""
    with lock:
        return {token for one in _active.values() for token in one.tokens}


def in_effect(marks: Sequence[str]) -> list[tuple[str, bool]]:
    """Return the names of the replacements that run for an instance with these marks, and whether each is compat."""
    with lock:
        return sorted((one.replacement.name, one.compat) for one in _active.values()
                      if one.everyone or not one.tokens.isdisjoint(marks))


def _count(records: Sequence[ActiveReplacement], token: str | None, by: int) -> None:
    """Add a handle to the records (by = 1), or remove it (by = -1)."""
    for one in records:
        if token is None:
            one.everyone += by
        elif by > 0:
            one.tokens.add(token)
        else:
            one.tokens.discard(token)


def reset_compiled() -> None:
    """Drop Dynamo's compiled frames, which inlined the methods before the replacement."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _new(replacement: Replacement, compat: bool) -> ActiveReplacement:
    own, found = _own(replacement), _inherited(replacement)
    return ActiveReplacement(replacement, compat, own, found, replacement.build(found), current=own)


def _check_current(records: Sequence[ActiveReplacement]) -> None:
    for one in records:
        if _own(one.replacement) is not one.current:
            raise RuntimeError(f"{one.replacement.name} was replaced by other code after patch(): undo that first")


def _apply(records: Sequence[ActiveReplacement]) -> None:
    """Set each attribute to what its holders ask for."""
    changed = False
    for one in records:
        key = id(one.replacement.owner), one.replacement.attribute
        held = one.everyone > 0 or bool(one.tokens)
        wanted = one.ours if one.everyone else one.gate if held else one.original
        if wanted is not one.current:
            changed = True
            _put(one.replacement, wanted)
            one.current = wanted
        if held:
            _active[key] = one
        else:
            _active.pop(key, None)
    if changed:
        reset_compiled()


def _namespace(replacement: Replacement) -> Any:
    return replacement.owner if isinstance(replacement.owner, dict) else vars(replacement.owner)


def _own(replacement: Replacement) -> Any:
    """Return the owner's own attribute, or _MISSING."""
    return _namespace(replacement).get(replacement.attribute, _MISSING)


def _inherited(replacement: Replacement) -> Any:
    """Return the attribute, inherited or not, or None."""
    return _namespace(replacement).get(replacement.attribute, getattr(replacement.owner, replacement.attribute, None))


def _put(replacement: Replacement, value: Any) -> None:
    if isinstance(replacement.owner, dict):
        if value is _MISSING:
            del replacement.owner[replacement.attribute]
        else:
            replacement.owner[replacement.attribute] = value
    elif value is _MISSING:
        delattr(replacement.owner, replacement.attribute)
    else:
        setattr(replacement.owner, replacement.attribute, value)
