"""The shards of a prompt: which tokens each worker reads, and whether it summarises them first. Pure data."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

MIN_TOKENS = 2  # of a shard: a single one would be a decoding step
REBALANCE = 1.1  # time of the slowest shard, relative to the best possible, above which shards are rebalanced


class Shard(NamedTuple):
    """The tokens [start, stop) of a prompt; numbered from the start."""

    number: int
    start: int
    stop: int
    last: bool


def split(tokens: int, weights: Sequence[float]) -> list[Shard]:
    """Return one shard per worker, in proportion to the weights; fewer if there are too few tokens for all.

    Raises ValueError for a prompt shorter than MIN_TOKENS, and for weights that are not above 0.
    """
    if tokens < MIN_TOKENS:
        raise ValueError(f"tokens must hold at least {MIN_TOKENS}, got {tokens}")
    if not weights or min(weights) <= 0:
        raise ValueError(f"weights must be one a worker, above 0, got {list(weights)}")
    weights = weights[: tokens // MIN_TOKENS]
    spare, whole = tokens - MIN_TOKENS * len(weights), sum(weights)
    ends = [round(spare * part / whole) + MIN_TOKENS * count
            for count, part in enumerate(itertools.accumulate(weights), start=1)]
    starts = [0, *ends[:-1]]
    return [Shard(number, start, stop, stop == tokens)
            for number, (start, stop) in enumerate(zip(starts, ends, strict=True))]


def rebalance(weights: Sequence[float], speeds: Sequence[float]) -> list[float]:
    """Return the weights for the next prompt, from those of the last and the workers' speeds.

    They are kept, and with them the bits of the results, until others would save a tenth of the time.
    """
    longest = max(weight / speed for weight, speed in zip(weights, speeds, strict=True))
    return list(speeds) if longest * sum(speeds) > REBALANCE * sum(weights) else list(weights)


def summarize_first(workers: int, layers: int | None) -> bool:
    """Return whether workers should summarise their shards while they wait for a state, rather than only wait.

    A worker that only waits is one mLSTM behind the previous worker, in total (workers - 1) mLSTMs. A summary costs
    each worker a third of an mLSTM in each layer.
    """
    return layers is None or 3 * (workers - 1) > layers
