"""Progress on stderr: a bar on a terminal, a line every few seconds elsewhere, nothing with `--quiet`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch_xlstm_ops.context import Progress

LINE_SECONDS = 5.0  # between progress lines without a terminal


class ProgressDisplay:
    """Show what the command waits for, and how much of the prompt is read."""

    def __init__(self, quiet: bool) -> None:
        from rich.console import Console

        self._quiet = quiet
        self._console = Console(stderr=True)
        self._next = time.monotonic() + LINE_SECONDS

    def status(self, text: str) -> AbstractContextManager[object]:
        """Return a context manager that shows what the command waits for."""
        if self._quiet:
            return nullcontext()
        if self._console.is_terminal:
            return self._console.status(text)
        self._console.print(text, highlight=False, markup=False)
        return nullcontext()

    @contextmanager
    def prefill(self, total: int) -> Iterator[Callable[[Progress], None]]:
        """Yield a function that shows the progress of reading a prompt."""
        from rich import progress

        if self._quiet:
            yield lambda step: None
            return
        if not self._console.is_terminal:
            yield lambda step: self._line(f"prefill {step.position} of {total} tokens, {step.tokens_per_second:.0f} "
                                          f"tokens/s, {step.seconds_left or 0:.0f} s left")
            return
        columns = (progress.TextColumn("prefill"), progress.BarColumn(), progress.MofNCompleteColumn(),
                   progress.TextColumn("{task.fields[speed]:.0f} tokens/s"), progress.TimeRemainingColumn())
        with progress.Progress(*columns, console=self._console, transient=True) as bar:
            task = bar.add_task("", total=total, speed=0.0)
            yield lambda step: bar.update(task, completed=step.position, speed=step.tokens_per_second)

    def _line(self, text: str) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + LINE_SECONDS
            self._console.print(text, highlight=False, markup=False)
