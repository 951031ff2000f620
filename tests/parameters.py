"""Parameters of which the first are for every run, and the others for the long one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def tail(values: Iterable[Any], quick: int | Callable[[Any], bool] = 1) -> list[Any]:
    """Return values as parameters, marked slow but for the first `quick` or those that `quick` holds for."""
    keep = quick if callable(quick) else None
    found = []
    for at, value in enumerate(values):
        fast = keep(value) if keep is not None else at < int(quick)  # type: ignore[call-overload]
        several = isinstance(value, tuple) and not hasattr(value, "_fields")
        found.append(pytest.param(*(value if several else (value,)), marks=() if fast else pytest.mark.slow))
    return found
