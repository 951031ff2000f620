"""Numbers of bytes and moments, as people write and read them."""

from __future__ import annotations

import re
import time

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


def ago(moment: float) -> str:
    """Return how long ago a moment, in seconds since the epoch, was."""
    seconds = max(0.0, time.time() - moment)
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.0f} {name} ago"
    return f"{seconds:.0f} s ago"
