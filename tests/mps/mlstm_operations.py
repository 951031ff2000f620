"""Ways to call the mLSTM ops, each with the recurrence as its oracle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_xlstm_ops.maths import mlstm

EPS = 1e-6
_PADDING = (0.0, 0.0, 0.0, -torch.inf, torch.inf)


class MLSTM(NamedTuple):
    """One way to call an op: tokens, schedule, configuration, with a state or without, with its gradient or without."""

    op: str
    tokens: int = 0
    schedule: str = "inductor"
    config: Mapping[str, Any] = MappingProxyType({})
    state: bool = False
    gradient: bool = False
    quick: str = "bfloat16"  # the dtype of the default run, if any; the others are slow
    rows: tuple[int, int] = (2, 2)
    DHQK: int = 40
    DHHV: int = 72
    chunk_size: int = 64

    def arguments(self, dtype: torch.dtype) -> list[Tensor]:
        """Return q, k, v, igate, fgate and, with a state, c, n, m, on the CPU."""
        generator = torch.Generator().manual_seed(0)
        step = self.op.startswith("mlstm_step")
        S, gate = ((), (1,)) if step else ((self.tokens,), (self.tokens,))
        shapes: list[tuple[int, ...]] = [(*S, self.DHQK), (*S, self.DHQK), (*S, self.DHHV), gate, gate]
        streams = [torch.randn(*self.rows, *shape, generator=generator) for shape in shapes]
        streams[4] += 3
        states = [torch.randn(*self.rows, *shape, generator=generator)
                  for shape in ((self.DHQK, self.DHHV), (self.DHQK,), (1,))]
        return [t.to(dtype) for t in streams] + (states if self.state or step else [])

    def gradients(self, args: list[Tensor]) -> list[Tensor]:
        """Return what to put into the backward pass: one tensor for each result, or nothing."""
        if not self.gradient:
            return []
        generator = torch.Generator().manual_seed(1)
        shapes = ((self.tokens, self.DHHV), (self.DHQK, self.DHHV), (self.DHQK,), (1,))
        dh, *dstate = [torch.randn(*self.rows, *shape, generator=generator) for shape in shapes]
        return [dh.to(args[2].dtype), *dstate]

    def call(self, args: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        """Call the op; return its results and the states it wrote, or the gradients of its arguments."""
        op = getattr(torch.ops.xlstm, self.op)
        if self.op == "mlstm_step_":
            states = [t.clone() for t in args[5:]]
            return [op(*args[:5], *states), *states]
        if self.op == "mlstm_step":
            return list(op(*args))
        how = {"chunk_size": self.chunk_size, "schedule": self.schedule}
        return self._results(lambda *given: op(*given, **how), args, gradients)

    def oracle(self, args: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        """Return what `call` has to return, by the recurrence."""
        if self.op != "mlstm_chunkwise":
            return list(mlstm.step(*args, eps=EPS))
        return self._results(lambda *given: mlstm.recurrent(*given, eps=EPS), self._with_state(args), gradients)

    def eager(self, args: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        """Return what plain eager products in the arguments' dtype give on the CPU."""
        if self.op != "mlstm_chunkwise":
            return list(mlstm.step(*args, eps=EPS))
        return self._results(self._segment, self._with_state(args), gradients)

    def _results(self, run: Callable[..., Any], args: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        if not gradients:
            return list(run(*args))
        inputs = [t.detach().requires_grad_() for t in args]
        return list(torch.autograd.grad(run(*inputs), inputs, gradients))

    def _with_state(self, args: list[Tensor]) -> list[Tensor]:
        if self.state:
            return args
        wide = torch.float64 if args[0].dtype == torch.float64 else torch.float32
        shapes = ((self.DHQK, self.DHHV), (self.DHQK,), (1,))
        return [*args, *(torch.zeros(*self.rows, *shape, dtype=wide) for shape in shapes)]

    def _segment(self, *args: Tensor) -> list[Tensor]:
        """Run the whole sequence as one eager segment, padded to whole chunks."""
        L = self.chunk_size
        missing = -self.tokens % L
        rows = []
        for t, value in zip(args[:5], _PADDING, strict=True):
            padded = torch.cat([t, t.new_full((*t.shape[:2], missing, *t.shape[3:]), value)], 2)
            rows.append(padded.flatten(0, 1).unflatten(1, (-1, L)))
        h, *state = mlstm.segment(*rows, *(t.flatten(0, 1) for t in args[5:]), eps=EPS)
        h = h.flatten(1, 2)[:, : self.tokens].unflatten(0, self.rows)
        return [h, *(t.unflatten(0, self.rows) for t in state)]


TWO_SEGMENTS = {"segment": 128, "heads_per_band": 3}
OPERATIONS = {
    "step": MLSTM("mlstm_step", quick=""),
    "step in place": MLSTM("mlstm_step_"),
    # One SIMD group, and more keys than a threadgroup has threads: the kernel that stores m over what it read.
    "step in place, few keys": MLSTM("mlstm_step_", DHQK=32, DHHV=8, quick=""),
    "step in place, many keys": MLSTM("mlstm_step_", DHQK=1030, DHHV=8, quick=""),
    "one segment": MLSTM("mlstm_chunkwise", 128),
    "tail": MLSTM("mlstm_chunkwise", 150, quick=""),
    "one token": MLSTM("mlstm_chunkwise", 1, state=True, quick=""),
    "bands and segments": MLSTM("mlstm_chunkwise", 300, config=TWO_SEGMENTS, state=True, quick=""),
    "queued": MLSTM("mlstm_chunkwise", 300, "queued", config=TWO_SEGMENTS, state=True, quick=""),
    "recurrent": MLSTM("mlstm_chunkwise", 5, "recurrent", state=True),
    "gradient": MLSTM("mlstm_chunkwise", 150, gradient=True, state=True, quick=""),
    "gradient over segments": MLSTM(
        "mlstm_chunkwise", 300, config=TWO_SEGMENTS, gradient=True, state=True, quick=""
    ),
}
