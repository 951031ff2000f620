"""Run `generate`: text on stdout while it is generated, progress on stderr, and a table of measurements at the end.

The table goes to stdout on a terminal, else to stderr, so that a file or a pipe gets the text only.
"""

from __future__ import annotations

import io
import itertools
import sys
import time
from collections.abc import Generator
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

from torch_xlstm_ops import trace
from torch_xlstm_ops.cli.generation import report, sampling, stream
from torch_xlstm_ops.cli.generation.meter import Meter, write_stats
from torch_xlstm_ops.cli.generation.progress import ProgressDisplay
from torch_xlstm_ops.cli.generation.prompt import LongPrompt, Prompt, prompt_of
from torch_xlstm_ops.cli.generation.request import GenerateRequest
from torch_xlstm_ops.cli.generation.stream import StateStore, WarmUp
from torch_xlstm_ops.cli.shared.errors import BadInput, bad_input
from torch_xlstm_ops.cli.shared.loading import Loaded, end_tokens, load
from torch_xlstm_ops.context import StatePool, states

if TYPE_CHECKING:
    from torch_xlstm_ops.cli.generation.workers import PrefillWorkers

STATS_EVERY = 16  # tokens
INTERRUPT = "interrupt"


class _Run(NamedTuple):
    """One request with its model, ready to generate."""

    request: GenerateRequest
    loaded: Loaded
    prompt: Prompt
    meter: Meter
    display: ProgressDisplay
    store: StateStore
    workers: PrefillWorkers | None


def write_text(request: GenerateRequest) -> int:
    """Write what was requested and return the exit status: 130 if the user interrupted."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model may write what this terminal cannot show
    display = ProgressDisplay(request.quiet)
    with display.status(f"loading {request.model.resolve().name}"):
        loaded = load(request.model, request.device, request.values["dtype"], patched=request.patched)
        prompt = prompt_of(loaded, request.prompt)
    every = (request.values["stats_every"] or STATS_EVERY) if request.values["stats_log"] is not None else None
    meter = Meter(loaded.device, every)
    with ExitStack() as undo:
        if request.patched:
            from torch_xlstm_ops.patch import patch

            undo.callback(patch("transformers").remove)
        with bad_input():
            pool = None if request.pool is None else StatePool(loaded.model, request.pool)
        workers = _start_workers(request, loaded, prompt, undo)
        undo.enter_context(stream.prepared(loaded))
        run = _Run(request, loaded, prompt, meter, display, StateStore(pool, request.resume), workers)
        began = time.perf_counter()
        warmed = _warm_up(run)
        warm_up_seconds = time.perf_counter() - began
        ended = _generate(run)
    _finish(run, warmed, warm_up_seconds, ended)
    return 130 if ended == INTERRUPT else 0


def _start_workers(
    request: GenerateRequest, loaded: Loaded, prompt: Prompt, undo: ExitStack
) -> PrefillWorkers | None:
    """Return the workers that read the prompt, if the request has any; `undo` ends them."""
    count = request.values["prefill_workers"]
    if count is None:
        return None
    from torch_xlstm_ops.cli.generation.workers import PrefillWorkers

    return undo.enter_context(PrefillWorkers(loaded, prompt, count, request.values["worker_gpus"]))


def _warm_up(run: _Run) -> WarmUp:
    with run.display.status("compiling, once on this machine" if run.request.patched else "warming up"):
        told = not run.request.quiet or run.request.values["stats_log"] is not None
        warmed = stream.warm_up(run.loaded, run.prompt, record=told)
        if run.workers is not None:
            run.workers.warm_up(run.prompt)
    return warmed


def _generate(run: _Run) -> str:
    """Print the text while it is generated, and return what ended it."""
    values = run.request.values
    choose = sampling.chooser(
        temperature=values["temperature"], top_k=values["top_k"], top_p=values["top_p"], seed=values["seed"]
    )
    with run.display.prefill(len(run.prompt)) as progress:
        tokens = stream.generate_tokens(run.loaded, run.prompt, choose, values["max_new_tokens"], run.meter, progress,
                                        run.store, run.workers)
        try:
            first = next(tokens)
        except KeyboardInterrupt:
            return INTERRUPT
        except states.StateMismatch as error:
            raise BadInput(f"--resume: {error}") from error
    return _print_tokens(run, first, tokens)


def _print_tokens(run: _Run, first: int, tokens: Generator[int, None, None]) -> str:
    last = run.prompt.last if isinstance(run.prompt, LongPrompt) else run.prompt
    text = sampling.TextStream(run.loaded.tokenizer, last, run.request.stops)
    ends, ended = end_tokens(run.loaded), INTERRUPT
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
        pass  # the text so far is shown and measured
    finally:
        tokens.close()
    print(text.flush(), flush=True)
    return ended


def _finish(run: _Run, warmed: WarmUp, warm_up_seconds: float, ended: str) -> None:
    """Write the statistics and the trace, and print the table."""
    request, meter = run.request, run.meter
    about = report.facts(request, run.loaded, warmed, meter)
    about |= {"prompt tokens": len(run.prompt), **report.tokens_read(run.store, meter), "ended by": ended}
    about["warm-up s"] = round(warm_up_seconds, 3)
    if request.values["stats_log"] is not None:
        write_stats(request.values["stats_log"], meter.rows, about)
    recording = trace.finish()
    if not request.quiet:
        resume = request.resume if ended == INTERRUPT else None
        notes = [run.workers and run.workers.report, recording and recording.summary(),
                 resume and report.how_to_resume(resume, len(run.prompt))]
        report.print_table(about, [str(note) for note in notes if note is not None])
