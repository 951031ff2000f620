"""What reading a prompt by several workers took."""

from __future__ import annotations

from typing import NamedTuple

from torch_xlstm_ops.parallel.passing import SLSTM
from torch_xlstm_ops.parallel.worker import Read


class Report(NamedTuple):
    """The stretches of a prompt, in order."""

    reads: tuple[Read, ...]
    ahead: bool  # whether stretches were summed up while their workers waited
    replays: int  # workers that were lost

    @property
    def speeds(self) -> list[float]:
        """Return the tokens a second of each worker's work."""
        return [read.speed for read in self.reads]

    @property
    def bytes_per_layer(self) -> int:
        """Return the most bytes that a worker sent after a layer."""
        return max((size for read in self.reads for size in read.sent), default=0)

    @property
    def piped(self) -> float:
        """Return what sLSTM layers cost, which workers do one after another: the longest wait in them, in seconds."""
        return max(read.piped for read in self.reads)

    def __str__(self) -> str:
        lines = ["worker  tokens   seconds  waited   tokens/s  sent"]
        for read in self.reads:
            number, start, stop, _ = read.stretch
            lines.append(f"{number:<6}  {stop - start:<7}  {read.seconds:<7.2f}  {read.waited:<7.2f}  "
                         f"{read.speed:<8.0f}  {sum(read.sent) / 2**20:.2f} MB")
        how = "stretches summed up while waiting" if self.ahead else "no sums ahead: fewer workers than they pay for"
        lines.append(f"{how}; {self.replays} read again")
        count = self.reads[0].layers.count(SLSTM)
        if count:
            lines.append(f"sLSTM layers: {count}, done by one worker after another, for which one waited "
                         f"{self.piped:.2f} s")
        return "\n".join(lines)
