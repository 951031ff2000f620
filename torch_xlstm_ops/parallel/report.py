"""The report of a prefill by several workers: times, speeds and bytes."""

from __future__ import annotations

from typing import NamedTuple

from torch_xlstm_ops.parallel.sequence_parallel import SLSTM
from torch_xlstm_ops.parallel.worker import ShardRead


class Report(NamedTuple):
    """Measurements of the shards of a prompt, in order."""

    reads: tuple[ShardRead, ...]
    summarize_first: bool  # whether workers summarised their shards while they waited
    replays: int  # workers that died

    @property
    def speeds(self) -> list[float]:
        """Return each worker's speed in tokens per second, waiting excluded."""
        return [read.speed for read in self.reads]

    @property
    def bytes_per_layer(self) -> int:
        """Return the largest number of bytes that a worker sent after a layer."""
        return max((size for read in self.reads for size in read.sent), default=0)

    @property
    def slstm_wait(self) -> float:
        """Return the longest wait in sLSTM layers, which the workers run one after another, in seconds."""
        return max(read.slstm_wait for read in self.reads)

    def __str__(self) -> str:
        lines = ["worker  tokens   seconds  waited   tokens/s  sent"]
        for read in self.reads:
            number, start, stop, _ = read.shard
            lines.append(f"{number:<6}  {stop - start:<7}  {read.seconds:<7.2f}  {read.waited:<7.2f}  "
                         f"{read.speed:<8.0f}  {sum(read.sent) / 2**20:.2f} MB")
        how = "shards were summarised first" if self.summarize_first else "no summaries: too few workers to gain"
        lines.append(f"{how}; {self.replays} shards read again")
        count = self.reads[0].layers.count(SLSTM)
        if count:
            lines.append(f"sLSTM layers: {count}, run by one worker after another; longest wait "
                         f"{self.slstm_wait:.2f} s")
        return "\n".join(lines)
