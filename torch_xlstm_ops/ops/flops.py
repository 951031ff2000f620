"""What `torch.utils.flop_counter` counts for each operator: matrix products alone, 2 for each multiply-add.

Counted are the products of the mathematics, whatever a schedule adds: segments, padding, and the products that pass
states from chunk to chunk are left out. A mask counts in full, as in torch's formulas for attention: neither `reset`
nor the causal half of a chunk's scores is taken off.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from torch_xlstm_ops import config
from torch_xlstm_ops.schedules import plan


def mlstm_step(q: Tensor, k: Tensor, v: Tensor, *args: Any, **how: Any) -> int:
    """Count a step: ``k v^T`` and ``q C``, 2 * 2 DHQK DHHV a head."""
    return 4 * q.numel() * v.shape[-1]


def mlstm_chunkwise(
    q: Tensor, k: Tensor, v: Tensor, *args: Any, chunk_size: int | None = None, schedule: str | None = None, **how: Any
) -> int:
    """Count a sequence; a head takes, for each chunk of L tokens,

        2 L^2 (DHQK + DHHV)     q k^T, and what comes of it times v
        2 L DHQK DHHV * 2       q C, and k^T v, which the chunk adds to C

    The last chunk has the tokens that are left. Where `chunk_size` is None, L is as planned for the device, untuned.
    """
    tokens, squares = _tokens(q, v, chunk_size, schedule)
    DHQK, DHHV = q.shape[-1], v.shape[-1]
    return 2 * (squares * (DHQK + DHHV) + 2 * tokens * DHQK * DHHV)


def mlstm_chunkwise_backward(
    dh: Tensor, dc: Tensor, dn: Tensor, dm: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any,
    chunk_size: int | None = None, schedule: str | None = None, **how: Any,
) -> int:
    """Count the gradient of a sequence; a head takes, for each chunk of L tokens,

        2 L^2 (3 DHQK + 2 DHHV)     q k^T again, dh v^T, and the scores' part of dq, dk and dv
        2 L DHQK DHHV * 5           k^T v again, q^T dh, and C's part of dq, dk and dv
    """
    tokens, squares = _tokens(q, v, chunk_size, schedule)
    DHQK, DHHV = q.shape[-1], v.shape[-1]
    return 2 * (squares * (3 * DHQK + 2 * DHHV) + 5 * tokens * DHQK * DHHV)


def _tokens(q: Tensor, v: Tensor, chunk_size: int | None, schedule: str | None) -> tuple[int, int]:
    """Return the tokens of all heads, and the sum of the squares of their chunks' lengths."""
    B, NH, S, DHQK = q.shape
    cfg = config.for_call(chunk_size=chunk_size, schedule=schedule)
    L = plan.make(plan.Shape(B * NH, S, DHQK, v.shape[-1]), q.device.type, cfg).chunk_size
    return B * NH * S, B * NH * (S // L * L * L + (S % L) ** 2)


def slstm_step(x: Tensor, *args: Any, **how: Any) -> int:
    """Count a step: ``R y`` of four gates, 2 * 4 DH^2 a head."""
    return 2 * x.numel() * x.shape[-1]


def slstm_sequence(x: Tensor, *args: Any, **how: Any) -> int:
    """Count a sequence: a step's product for each token."""
    return 2 * x.numel() * x.shape[-1]


def slstm_sequence_backward(dh: Tensor, *args: Any, **how: Any) -> int:
    """Count the gradient: for each token ``R y`` again, and the product's gradients of y and of R."""
    return 3 * 2 * 4 * math.prod(dh.shape) * dh.shape[-1]
