"""The checks of the sLSTM operators' arguments, and the state where none is given."""

from __future__ import annotations

from torch import Tensor

from torch_xlstm_ops.maths import shapes
from torch_xlstm_ops.maths.shapes import check_shape, state_dtype

State = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # y, c, n, m (B, NH, DH)


def check_sequence(x: Tensor, r: Tensor, b: Tensor, state: State, reset: Tensor | None, floor: float) -> None:
    """Raise ValueError or TypeError for arguments of a sequence that do not go together."""
    shapes.check_rank("x", x, "B S 4 NH DH")
    B, S, _, NH, DH = x.shape
    sizes = {"B": B, "S": S, "NH": NH, "DH": DH}
    check_shape("x", x, "B S 4 NH DH", sizes)
    _check_rest(x, r, b, state, sizes, floor)
    if reset is not None:
        shapes.check_reset(reset, sizes, x=x)


def check_step(x: Tensor, r: Tensor, b: Tensor, state: State, floor: float) -> None:
    """Raise ValueError or TypeError for arguments of a step that do not go together."""
    shapes.check_rank("x", x, "B 4 NH DH")
    B, _, NH, DH = x.shape
    sizes = {"B": B, "NH": NH, "DH": DH}
    check_shape("x", x, "B 4 NH DH", sizes)
    _check_rest(x, r, b, state, sizes, floor)


def fresh_state(x: Tensor) -> list[Tensor]:
    """Return y, c, n, m before the first token of x (B, S, 4, NH, DH)."""
    return [*x.new_zeros(4, x.shape[0], *x.shape[3:], dtype=state_dtype(x.dtype)).unbind()]


def check_gradients(dh: Tensor, dstate: tuple[Tensor, ...], x: Tensor, h: Tensor) -> None:
    """Raise ValueError or TypeError unless h and the gradients of the results fit x."""
    B, S, _, NH, DH = x.shape
    sizes = {"B": B, "S": S, "NH": NH, "DH": DH}
    for name, t in (("dh", dh), ("h", h)):
        check_shape(name, t, "B S NH DH", sizes)
    named = dict(zip(("dy", "dc", "dn", "dm"), dstate, strict=True))
    for name, t in named.items():
        check_shape(name, t, "B NH DH", sizes)
    shapes.check_stream(x=x, h=h)
    shapes.check_device(x=x, h=h, dh=dh, **named)


def _check_rest(x: Tensor, r: Tensor, b: Tensor, state: State, sizes: dict[str, int], floor: float) -> None:
    check_shape("r", r, "4 NH DH DH", sizes)
    check_shape("b", b, "4 NH DH", sizes)
    shapes.check_stream(x=x, r=r)
    shapes.check_floating(b=b)
    named = dict(zip(("y", "c", "n", "m"), state, strict=True))
    shapes.check_all_or_none(**named)
    given = {name: t for name, t in named.items() if t is not None}
    for name, t in given.items():
        check_shape(name, t, "B NH DH", sizes)
    shapes.check_state_dtype(x.dtype, **given)
    shapes.check_device(x=x, r=r, b=b, **given)
    shapes.check_not_negative("floor", floor)
