"""Which tokens of a prompt each worker reads, and whether it runs ahead of the state that it needs. Pure data."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

LEAST = 2  # tokens of a stretch: a single one would be a decoding step
SLACK = 1.1  # how many times as long as it must a prompt may take before its stretches are cut anew


class Stretch(NamedTuple):
    """The tokens [start, stop) of a prompt; the number counts from the beginning."""

    number: int
    start: int
    stop: int
    last: bool


def cut(tokens: int, weights: Sequence[float]) -> list[Stretch]:
    """Return a stretch a worker, in proportion to their weights; fewer where there are too few tokens for all.

    Raises ValueError for a prompt shorter than a stretch may be, and for weights that are not above 0.
    """
    if tokens < LEAST:
        raise ValueError(f"tokens must hold at least {LEAST}, got {tokens}")
    if not weights or min(weights) <= 0:
        raise ValueError(f"weights must be one a worker, above 0, got {list(weights)}")
    weights = weights[: tokens // LEAST]
    spare, whole = tokens - LEAST * len(weights), sum(weights)
    ends = [round(spare * part / whole) + LEAST * count
            for count, part in enumerate(itertools.accumulate(weights), start=1)]
    starts = [0, *ends[:-1]]
    return [Stretch(number, start, stop, stop == tokens)
            for number, (start, stop) in enumerate(zip(starts, ends, strict=True))]


def replan(weights: Sequence[float], speeds: Sequence[float]) -> list[float]:
    """Return the weights of the next prompt's stretches, from those of the last and the workers' speeds.

    They stay, and with them every bit of what is found, until other stretches would save a tenth of the time.
    """
    longest = max(weight / speed for weight, speed in zip(weights, speeds, strict=True))
    return list(speeds) if longest * sum(speeds) > SLACK * sum(weights) else list(weights)


def ahead(workers: int, layers: int | None) -> bool:
    """Return whether workers sum up their stretches while they wait, rather than wait alone.

    Whoever waits alone runs one mLSTM behind the worker before, once: (workers - 1) mLSTMs in all. Summing up costs
    each worker a third of an mLSTM in each layer.
    """
    return layers is None or 3 * (workers - 1) > layers
