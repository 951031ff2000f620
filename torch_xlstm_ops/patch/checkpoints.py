"""Convert sLSTM weights of the package xlstm between the layouts of its two backends.

The recurrent weights are (NH, 4 DH_out, DH_in) for "vanilla" and (NH, DH_in, 4 DH_out) for "cuda", so that their shape
identifies the layout. The bias is flat in both, (4, NH, DH) and (NH, 4, DH), and does not identify it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor

WEIGHTS, BIAS = "_recurrent_kernel_", "_bias_"
BACKENDS = ("vanilla", "cuda")
States = TypeVar("States", bound=Mapping[str, Any])


def convert_slstm_state_dict(state_dict: States, *, to: str, prefix: str = "") -> States:
    """Return a copy of a state dict with its sLSTM cells in the layout of one of xlstm's backends.

    state_dict: of a cell, a layer or a model of xlstm. Cells in that layout, and all other entries, are not changed.
    to: the backend to load it with, "vanilla" or "cuda".
    prefix: convert only the cells whose names begin with it, default all.
    Raises ValueError for another backend, and for a cell that is in neither layout or has no bias.
    """
    if to not in BACKENDS:
        raise ValueError(f"to must be one of {', '.join(BACKENDS)}, got {to!r}")
    found: Any = copy.copy(state_dict)  # with its _metadata, if it has any
    for key in [key for key in state_dict if key.startswith(prefix) and key.split(".")[-1] == WEIGHTS]:
        cell = key[: -len(WEIGHTS)]
        if layout(state_dict, cell) != to:
            found[key], found[cell + BIAS] = converted(state_dict[key], state_dict[cell + BIAS], to)
    return found  # type: ignore[no-any-return]


def layout(state_dict: Mapping[str, Any], cell: str) -> str:
    """Return the backend whose layout the weights of a cell have. Raises ValueError if they have neither."""
    r, b = state_dict[cell + WEIGHTS], state_dict.get(cell + BIAS)
    if b is None:
        raise ValueError(f"state_dict must hold {cell}{BIAS} beside {cell}{WEIGHTS}, got none")
    NH, rows, columns = r.shape if r.dim() == 3 else (0, 0, 0)
    DH = min(rows, columns)
    if DH == 0 or max(rows, columns) != 4 * DH or b.numel() != 4 * NH * DH:
        raise ValueError(f"{cell}{WEIGHTS} must be (NH, 4 DH, DH) or (NH, DH, 4 DH) and {cell}{BIAS} hold 4 NH DH, got "
                         f"{tuple(r.shape)} and {tuple(b.shape)}")
    return "vanilla" if rows > columns else "cuda"


def converted(r: Tensor, b: Tensor, to: str) -> tuple[Tensor, Tensor]:
    """Return copies of a cell's weights and bias, converted from the other backend's layout."""
    NH = r.shape[0]
    heads_and_gates = (NH, 4, -1) if to == "vanilla" else (4, NH, -1)
    return r.mT.contiguous(), b.reshape(heads_and_gates).transpose(0, 1).reshape(b.shape)


def load_either(original: Callable[..., None]) -> Callable[..., None]:
    """Return a cell's `_load_from_state_dict` that takes the weights of either backend."""

    def load(self: Any, state_dict: Mapping[str, Any], prefix: str, *args: Any, **options: Any) -> None:
        own, given = self._recurrent_kernel_, state_dict.get(prefix + WEIGHTS)
        crossed = isinstance(given, Tensor) and given.shape != own.shape and given.shape == own.mT.shape
        if crossed and prefix + BIAS in state_dict:
            to = "vanilla" if own.shape[1] > own.shape[2] else "cuda"
            r, b = converted(state_dict[prefix + WEIGHTS], state_dict[prefix + BIAS], to)
            state_dict = {**state_dict, prefix + WEIGHTS: r, prefix + BIAS: b}
        original(self, state_dict, prefix, *args, **options)

    return load
