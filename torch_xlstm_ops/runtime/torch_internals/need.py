"""A need: a private API of torch, and the fallback for a torch without it."""

from __future__ import annotations

import functools
import importlib
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")
MOVED = (ImportError, AttributeError, TypeError)  # raised if a private name is missing or takes other arguments


class Need(Generic[_P, _R]):
    """Call `native`; after its first failure because torch moved something, call `fallback`.

    where: the full names that `native` uses. without: the effect of the fallback, as a clause for the warning.
    """

    def __init__(
        self, native: Callable[_P, _R], fallback: Callable[_P, _R], where: Sequence[str], without: str
    ) -> None:
        functools.update_wrapper(self, native)
        self.name: str = native.__name__.lstrip("_")
        self.native, self.fallback, self.where, self.without = native, fallback, where, without
        self.moved: str | None = None  # why the fallback is used; None while `native` works
        self.called = False
        self.run: Callable[_P, _R] = self  # for hot paths: after the first call, `native` or `fallback` itself

    def __call__(self, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        if self.moved is None:
            try:
                found = self.native(*args, **kwargs)
            except MOVED as error:
                self.give_up(error)
            else:
                self.called, self.run = True, self.native
                return found
        return self.fallback(*args, **kwargs)

    @property
    def what(self) -> str:
        """Return the first line of the docstring."""
        return (inspect.getdoc(self.native) or "").split("\n")[0]

    def give_up(self, error: BaseException) -> None:
        """Warn, and call `fallback` from now on."""
        self.moved, self.run = f"{type(error).__name__}: {error}", self.fallback
        warnings.warn(
            f"torch {torch.__version__} has moved one of {', '.join(self.where)} ({self.moved}): {self.without}",
            RuntimeWarning, stacklevel=3,
        )


NEEDS: dict[str, Need[..., object]] = {}


def need(
    fallback: Callable[_P, _R], *, where: Sequence[str], without: str
) -> Callable[[Callable[_P, _R]], Need[_P, _R]]:
    """Turn a function that uses private names of torch into a `Need`, and add it to `NEEDS`."""

    def decorate(native: Callable[_P, _R]) -> Need[_P, _R]:
        made = Need(native, fallback, where, without)
        NEEDS[made.name] = made  # type: ignore[assignment]
        return made

    return decorate


class Status(NamedTuple):
    """Whether one need uses the private API or the fallback in this process."""

    name: str
    what: str  # the first line of its docstring
    moved: str | None  # why the fallback is used; None: the private API is
    without: str  # the effect of the fallback


def status() -> tuple[Status, ...]:
    """Return the status of each need: by its calls, or, if it was not called, by whether its names exist."""
    return tuple(Status(one.name, one.what, one.moved or _missing(one), one.without) for one in NEEDS.values())


def _missing(one: Need[..., object]) -> str | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch warns when Inductor is imported
        gone = [] if one.called else [name for name in one.where if not _exists(name)]
    return f"there is no {', '.join(gone)}" if gone else None


def _exists(name: str) -> bool:
    """Return whether a full name can be resolved, by imports and attributes."""
    parts = name.split(".")
    found: object = importlib.import_module(parts[0])
    for at, part in enumerate(parts[1:], 2):
        try:
            found = getattr(found, part)
        except AttributeError:
            try:
                found = importlib.import_module(".".join(parts[:at]))
            except ImportError:
                return False
    return True
