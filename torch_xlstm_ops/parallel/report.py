"""What reading a prompt by several workers took."""

from __future__ import annotations

from typing import NamedTuple

from torch_xlstm_ops.parallel.worker import Read


class Report(NamedTuple):
    """The stretches of a prompt, in order."""

    reads: tuple[Read, ...]
    ahead: bool  # whether stretches were summed up while their workers waited
    replays: int  # workers that were lost

    @property
    def speeds(self) -> list[float]:
        """Return the tokens a second of each worker's work, as weights for the next prompt."""
        return [read.speed for read in self.reads]

    @property
    def bytes_per_layer(self) -> int:
        """Return the most bytes that a worker sent after a layer."""
        return max((size for read in self.reads for size in read.sent), default=0)

    def __str__(self) -> str:
        lines = ["worker  tokens   seconds  waited   tokens/s  sent"]
        for read in self.reads:
            number, start, stop, _ = read.stretch
            lines.append(f"{number:<6}  {stop - start:<7}  {read.seconds:<7.2f}  {read.waited:<7.2f}  "
                         f"{read.speed:<8.0f}  {sum(read.sent) / 2**20:.2f} MB")
        waiting = max(read.waiting_layers for read in self.reads)
        how = "stretches summed up while waiting" if self.ahead else "no sums ahead: fewer workers than they pay for"
        lines.append(f"{how}; {waiting} layers waited for the state before them; {self.replays} read again")
        return "\n".join(lines)
