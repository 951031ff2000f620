"""What the commands for kept files share: numbers of bytes and moments as people write them, and `verify`."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable

from torch_xlstm_ops.cli.shared.errors import BadInput

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def size(text: str | None) -> int:
    """Return what prune is to leave, in bytes. Raises BadInput."""
    if text is None:
        raise BadInput("prune must come with --bytes SIZE, what it leaves: a number of bytes, or one with K, M, G or T")
    found = re.fullmatch(r"(\d+)([KMGT]?)", text)
    if found is None:
        raise BadInput(f"--bytes must be a number of bytes, or one with K, M, G or T, got {text!r}")
    return int(found[1]) * _UNITS[found[2]]


def verified(found: Iterable[tuple[str | None, Callable[[], object]]], kind: str, *, remove: bool) -> int:
    """Print what is wrong with files, remove those if asked, and return the exit status: 1 if one is damaged.

    found: for each file what is wrong, or None, and what removes it. kind: what the files are, in the plural.
    """
    count = damaged = 0
    for wrong, take_away in found:
        count += 1
        if wrong is not None:
            damaged += 1
            print(wrong)
            if remove:
                take_away()
    print(f"{count} {kind}, {damaged} damaged" + (" and removed" if damaged and remove else ""))
    return 1 if damaged else 0


def ago(moment: float) -> str:
    """Return how long ago a moment, in seconds since the epoch, was."""
    seconds = max(0.0, time.time() - moment)
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.0f} {name} ago"
    return f"{seconds:.0f} s ago"
