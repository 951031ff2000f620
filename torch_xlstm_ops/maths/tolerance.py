"""Tolerances of results relative to the recurrence, for tests, `xlstm-ops check` and the tuner."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Relative, in the Euclidean norm. A segment rounds to its dtype half a dozen times on the way to h (k_gated, dC, W, C,
# q_gated, P, and h itself); in float32 and float64 the exponents' rounding, times their size, comes first.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
GRADIENT_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
NEGLIGIBLE = 1e-3  # a result's error is relative to at least this part of the largest norm


def error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Return the largest relative error of the results; NaN counts as infinite."""
    least = NEGLIGIBLE * max(float(t.norm()) for t in wanted)
    errors = [float((f.double() - w).norm()) / max(float(w.norm()), least) for f, w in zip(found, wanted, strict=True)]
    return max(e if e == e else float("inf") for e in errors)
