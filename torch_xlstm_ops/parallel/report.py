"""The report of a prefill by several workers: times, speeds and bytes."""

from __future__ import annotations

import statistics
from typing import NamedTuple

from torch_xlstm_ops import trace
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
    def hop_seconds(self) -> float | None:
        """Return the median seconds from when a state was there and wanted until it was received; None without any."""
        hops = [hop for read in self.reads for hop in read.hops]
        return statistics.median(hops) if hops else None

    @property
    def way(self) -> str | None:
        """Return how states were sent, as "device", "host" or "device, host"; None if none were."""
        return ", ".join(sorted({read.way for read in self.reads[:-1]})) or None

    @property
    def slstm_wait(self) -> float:
        """Return the longest wait in sLSTM layers, which the workers run one after another, in seconds."""
        return max(read.slstm_wait for read in self.reads)

    def trace(self) -> None:
        """Record each hop of a state, with its bytes; op "worker N", phase "hop device" or "hop host"."""
        if not trace.active():
            return
        for sender, receiver in zip(self.reads, self.reads[1:], strict=False):
            for layer, (size, seconds) in enumerate(zip(sender.sent, receiver.hops, strict=False)):
                trace.add(f"worker {receiver.shard.number}", seconds, schedule="ray", phase=f"hop {sender.way}",
                          layer=layer, segment=receiver.shard.number, nbytes=size)

    def __str__(self) -> str:
        lines = ["worker  tokens   seconds  waited   tokens/s  sent"]
        for read in self.reads:
            number, start, stop, _ = read.shard
            lines.append(f"{number:<6}  {stop - start:<7}  {read.seconds:<7.2f}  {read.waited:<7.2f}  "
                         f"{read.speed:<8.0f}  {sum(read.sent) / 2**20:.2f} MB")
        how = "shards were summarised first" if self.summarize_first else "no summaries: too few workers to gain"
        lines.append(f"{how}; {self.replays} shards read again")
        if self.hop_seconds is not None:
            lines.append(f"a state: {self.bytes_per_layer / 2**20:.2f} MB in {self.hop_seconds * 1e3:.2f} ms, "
                         f"by {self.way}")
        count = self.reads[0].layers.count(SLSTM)
        if count:
            lines.append(f"sLSTM layers: {count}, run by one worker after another; longest wait "
                         f"{self.slstm_wait:.2f} s")
        return "\n".join(lines)
