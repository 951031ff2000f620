"""Lower bounds of an mLSTM's time: its bytes at the rate of a copy, its products at the rate of a matrix product."""

from __future__ import annotations

import functools
from typing import NamedTuple, Protocol

import torch

from benchmarks.timing import timed
from torch_xlstm_ops.maths.shapes import state_dtype

_COPIED = {"cpu": 1 << 26, "cuda": 1 << 30, "mps": 1 << 28}  # bytes, more than caches hold
_SIDE = {"cpu": 1024, "cuda": 8192, "mps": 4096}  # of the square matrices
_ROUNDS = 12


class Rates(NamedTuple):
    """The best rates of the machine."""

    bytes_per_ms: float  # read and written
    flops_per_ms: float


class Sizes(Protocol):
    """The sizes of a call."""

    @property
    def B(self) -> int: ...
    @property
    def NH(self) -> int: ...
    @property
    def DHQK(self) -> int: ...
    @property
    def DHHV(self) -> int: ...
    @property
    def S(self) -> int: ...


@functools.cache
def rates(device: torch.device, dtype: torch.dtype, threads: int) -> Rates:
    """Measure a copy and a square matrix product, the best of several; `threads` is part of the cache key."""
    source = torch.ones(_COPIED[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    side = _SIDE[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    copy = min(timed(lambda: target.copy_(source), device) for _ in range(_ROUNDS))
    product = min(timed(lambda: torch.mm(a, b, out=out), device) for _ in range(_ROUNDS))
    return Rates(2 * source.numel() / copy, 2 * side**3 / product)


def step_ms(sizes: Sizes, dtype: torch.dtype, at: Rates) -> float:
    """Return the time to read and write the state once, and q, k, v, h."""
    rows = sizes.B * sizes.NH
    state = rows * (sizes.DHQK * sizes.DHHV + sizes.DHQK + 1) * state_dtype(dtype).itemsize
    streams = rows * (2 * sizes.DHQK + 2 * sizes.DHHV) * dtype.itemsize
    return (2 * state + streams) / at.bytes_per_ms


def sequence_ms(sizes: Sizes, dtype: torch.dtype, chunk_size: int, at: Rates, *, backward: bool = False) -> float:
    """Return the longer of two times: of the streams' bytes, each once, and of the products of the chunkwise form.

    A token of a chunk of L: q k^T and P v against L others, k v^T and q C against the state. The gradient does ten
    products more, q k^T and k v^T again among them.
    """
    tokens, K, V, L = sizes.B * sizes.NH * sizes.S, sizes.DHQK, sizes.DHHV, min(chunk_size, sizes.S)
    streams = tokens * (2 * K + 2 * V) * dtype.itemsize
    flops = 2 * tokens * (L * (K + V) + 2 * K * V)
    if backward:
        streams += tokens * (2 * K + 2 * V + 2 * K + V) * dtype.itemsize  # dh and the streams in, their gradients out
        flops += 2 * tokens * (L * (3 * K + 2 * V) + 5 * K * V)
    return max(streams / at.bytes_per_ms, flops / at.flops_per_ms)
