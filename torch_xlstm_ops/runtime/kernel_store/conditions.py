"""The sizes that a kept function is valid for, as text."""

from __future__ import annotations

import math

from torch_xlstm_ops.runtime import torch_internals
from torch_xlstm_ops.runtime.kernel_store.package import Damaged

_MAY_USE = {"__builtins__": {}, "min": min, "max": max, "math": math}


def write(admits: torch_internals.Admits) -> str | None:
    """Return the conditions as a Python expression of the free axes' names, or None if that cannot be."""
    if not isinstance(admits, torch_internals.Conditions):
        return None
    text = admits.written()
    try:
        read_back = read(text)
        samples = [dict.fromkeys(admits.axes, size) for size in (1, 2, 13)]
        same = all(read_back(sizes) == admits(sizes) for sizes in samples)
    except (Damaged, NameError, TypeError, AttributeError):
        return None
    return text if same else None


def read(text: str) -> torch_internals.Admits:
    """Return the test that `write` gave the text of. Raises Damaged."""
    try:
        code = compile(text, "<conditions>", "eval")
    except (SyntaxError, ValueError) as error:
        raise Damaged(f"its conditions cannot be read: {error}") from error

    def admits(sizes: dict[str, int]) -> bool:
        return bool(eval(code, _MAY_USE, {axis: max(2, size) for axis, size in sizes.items()}))

    return admits
