"""Run a request: text on stdout as it comes, progress on stderr, and a table of what was measured at the end.

The table goes to stdout on a terminal, else to stderr, so that a file or a pipe gets the text alone.
"""

from __future__ import annotations

import io
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from torch_xlstm_ops import config, context, trace
from torch_xlstm_ops.cli.generation import sampling, stream
from torch_xlstm_ops.cli.generation.meter import Meter, Row, write_stats
from torch_xlstm_ops.cli.generation.request import Request, bad_input
from torch_xlstm_ops.cli.shared.loading import BadInput, Loaded, LongPrompt, Prompt, end_tokens, load, prompt_of
from torch_xlstm_ops.context import codec, states
from torch_xlstm_ops.runtime import devices

if TYPE_CHECKING:
    from torch_xlstm_ops.cli.generation.workers import Readers

QUIET_SECONDS = 5.0  # between progress lines where there is no terminal
STATS_EVERY = 16
INTERRUPT = "interrupt"


def run(request: Request) -> int:
    """Write what was requested and return the exit status: 130 if the user interrupted."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model may write what this terminal cannot show
    shown = Progress(request.quiet)
    with shown.status(f"loading {request.model.resolve().name}"):
        loaded = load(request.model, request.device, request.values["dtype"])
        prompt = prompt_of(loaded, request.prompt)
    every = (request.values["stats_every"] or STATS_EVERY) if request.values["stats_log"] is not None else None
    meter = Meter(loaded.device, every)
    with ExitStack() as undo:
        if request.patched:
            from torch_xlstm_ops.patch import patch

            undo.callback(patch("transformers").remove)
        kept = _kept(request, loaded)
        readers = _readers(request, loaded, prompt)
        if readers is not None:
            undo.enter_context(readers)
        undo.enter_context(stream.prepared(loaded))
        began = time.perf_counter()
        with shown.status("compiling, once on this machine" if request.patched else "warming up"):
            ran = stream.warm_up(loaded, prompt)
            if readers is not None:
                readers.warm_up(prompt)
        compiling = time.perf_counter() - began
        ended = _write(request, loaded, prompt, meter, shown, kept, readers)
    about = _about(request, loaded, ran, meter)
    about |= {"prompt tokens": len(prompt), **_resumed(kept, meter), "ended by": ended}
    about["warm-up s"] = round(compiling, 3)
    if request.values["stats_log"] is not None:
        write_stats(request.values["stats_log"], meter.rows, about)
    recording = trace.finish()
    if not request.quiet:
        notes = [readers and readers.report, recording and recording.summary(),
                 _how_to_go_on(request.resume, len(prompt)) if ended == INTERRUPT and request.resume else None]
        _print_report(about, [str(note) for note in notes if note is not None])
    return 130 if ended == INTERRUPT else 0


def _kept(request: Request, loaded: Loaded) -> stream.Kept:
    """Return where states are kept, for the model as it will run."""
    with bad_input():
        pool = None if request.pool is None else context.StatePool(loaded.model, request.pool)
    return stream.Kept(pool, request.resume)


def _readers(request: Request, loaded: Loaded, prompt: Prompt) -> Readers | None:
    """Return the workers that read the prompt, if any were asked for."""
    count = request.values["prefill_workers"]
    if count is None:
        return None
    from torch_xlstm_ops.cli.generation.workers import Readers

    return Readers(loaded, prompt, count)


def _write(
    request: Request, loaded: Loaded, prompt: Prompt, meter: Meter, shown: Progress, kept: stream.Kept,
    readers: Readers | None,
) -> str:
    """Print the text as it comes, and return what ended it."""
    values = request.values
    choose = sampling.chooser(
        temperature=values["temperature"], top_k=values["top_k"], top_p=values["top_p"], seed=values["seed"]
    )
    last = prompt.last if isinstance(prompt, LongPrompt) else prompt
    text = sampling.TextStream(loaded.tokenizer, last, request.stops)
    ends = end_tokens(loaded)
    with shown.prefill(len(prompt)) as progress:
        tokens = stream.stream(loaded, prompt, choose, values["max_new_tokens"], meter, progress, kept, readers)
        ended = INTERRUPT
        try:
            first = next(tokens)
        except KeyboardInterrupt:
            return ended
        except states.Refused as error:
            raise BadInput(f"--resume: {error}") from error
    try:
        for token in itertools.chain((first,), tokens):
            if token in ends:
                ended = "end of text"
                break
            print(text.push(token), end="", flush=True)
            if text.stopped:
                ended = "stop text"
                break
        else:
            ended = "length"
    except KeyboardInterrupt:
        pass  # what is there is shown and measured
    finally:
        tokens.close()
    print(text.flush(), flush=True)
    return ended


def _about(request: Request, loaded: Loaded, ran: stream.Ran, meter: Meter) -> dict[str, object]:
    """Return the rows of the table: what ran, on what, and how fast."""
    prefill, decode = meter.final("prefill"), meter.final("decode")
    peak = devices.memory(loaded.device).peak
    schedule = ", ".join(ran.schedules) or str(config.current().schedule)
    return {
        "model": str(request.model),
        "device": str(loaded.device),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "schedule": schedule if request.patched else "none, as not patched",
        "prefill kernel": ", ".join(ran.prefill) or "transformers native",
        "decode kernel": ", ".join(ran.decode) or "transformers native",
        "prefill tok/s": _speed(prefill),
        "decode tok/s": _speed(decode),
        "time to first token s": None if prefill is None else round(prefill.seconds, 4),
        "peak memory GiB": None if peak is None else round(peak / 2**30, 2),
        "new tokens": (decode.tokens if decode is not None else 0) + (prefill is not None),
    }


def _resumed(kept: stream.Kept, meter: Meter) -> dict[str, object]:
    """Return what was read of the prompt, where some of it may have been read before."""
    prefill = meter.final("prefill")
    return {"prompt tokens read": None if prefill is None else prefill.tokens} if kept else {}


def _speed(row: Row | None) -> float | None:
    return None if row is None else round(row.average_tok_s, 2)


def _how_to_go_on(file: str, total: int) -> str:
    """Return what an interrupted user needs to know of `--resume`."""
    path = Path(file)
    if not path.exists():
        return f"interrupted before a part of the prompt was read: {file} is not written, the same command starts again"
    position = codec.from_file(path).about["position"]
    return (f"interrupted: {file} holds the state after {position} of the prompt's {total} tokens; "
            "run the same command to go on from there")


def _print_report(about: dict[str, object], notes: Sequence[str]) -> None:
    """Print the table and the notes: on stdout if it is a terminal, else on stderr."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, stderr=not sys.stdout.isatty())
    table = Table(show_header=False)
    for name, value in about.items():
        table.add_row(name, "-" if value is None else str(value))
    console.print(table)
    for note in notes:
        console.print(note, soft_wrap=True)


class Progress:
    """Progress on stderr: live on a terminal, a line now and then elsewhere, nothing if `quiet`."""

    def __init__(self, quiet: bool) -> None:
        from rich.console import Console

        self._quiet = quiet
        self._console = Console(stderr=True)
        self._next = time.monotonic() + QUIET_SECONDS

    def status(self, text: str) -> AbstractContextManager[object]:
        """Return a context manager that shows what is being waited for."""
        if self._quiet:
            return nullcontext()
        if self._console.is_terminal:
            return self._console.status(text)
        self._console.print(text, highlight=False, markup=False)
        return nullcontext()

    @contextmanager
    def prefill(self, total: int) -> Iterator[Callable[[context.Progress], None]]:
        """Yield what to call with how far the prompt is read."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        if self._quiet:
            yield lambda step: None
            return
        if not self._console.is_terminal:
            yield lambda step: self._line(f"prefill {step.position} of {total} tokens, {step.tokens_per_second:.0f} "
                                          f"tokens/s, {step.seconds_left or 0:.0f} s left")
            return
        columns = (TextColumn("prefill"), BarColumn(), MofNCompleteColumn(),
                   TextColumn("{task.fields[speed]:.0f} tokens/s"), TimeRemainingColumn())
        with Progress(*columns, console=self._console, transient=True) as bar:
            task = bar.add_task("", total=total, speed=0.0)
            yield lambda step: bar.update(task, completed=step.position, speed=step.tokens_per_second)

    def _line(self, text: str) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + QUIET_SECONDS
            self._console.print(text, highlight=False, markup=False)
