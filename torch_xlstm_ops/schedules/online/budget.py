"""The time that trials may lose: a part of the time spent so far, shared by kinds of call with the same kernels."""

from __future__ import annotations

from torch_xlstm_ops.runtime import forks

PART = 0.02


class Budget:
    """Seconds spent and lost; for several threads.

    part: of the time spent so far that trials may lose.
    """

    def __init__(self, part: float = PART) -> None:
        self.part = part
        self.spent = self.lost = 0.0
        self._ready: set[str] = set()  # plans whose kernels are there
        self._compiled: list[float] = []  # seconds of calls that had to wait for a kernel
        self._lock = forks.new_lock()

    def add(self, spent: float, lost: float) -> None:
        """Count a call: its seconds, and those that a trial took beyond the best so far."""
        with self._lock:
            self.spent += spent
            self.lost += lost

    def admits(self, seconds: float) -> bool:
        """Return whether a trial that loses so much stays within the budget."""
        return self.lost + seconds <= self.part * self.spent

    def note_kernels(self, plan: str, seconds: float | None) -> None:
        """Take note that a plan has its kernels, and of the seconds that they took if a call waited for them."""
        with self._lock:
            self._ready.add(plan)
            if seconds is not None:
                self._compiled.append(seconds)

    def compile_seconds(self, plan: str, assumed: float) -> float:
        """Return the expected seconds until a plan has its kernels; assumed: before any was timed."""
        if not assumed or plan in self._ready:
            return 0.0
        return sum(self._compiled) / len(self._compiled) if self._compiled else assumed

    def __str__(self) -> str:
        return f"{self.lost / max(self.spent, 1e-9):.1%} of the time lost to trials, at most {self.part:.0%}"
