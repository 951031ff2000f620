"""Run `xlstm-ops tune`: one search per length, with progress, and its winner saved for schedule auto."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import optuna
import torch

import torch_xlstm_ops
from torch_xlstm_ops import config
from torch_xlstm_ops.cli.generation import stream
from torch_xlstm_ops.cli.shared.loading import Loaded, load
from torch_xlstm_ops.cli.shared.table import aligned
from torch_xlstm_ops.cli.tuning import model_phases
from torch_xlstm_ops.cli.tuning.request import MODEL_PHASES, TuneRequest
from torch_xlstm_ops.config import tuned_plans
from torch_xlstm_ops.maths.intervals import in_words
from torch_xlstm_ops.maths.shapes import dtype_name
from torch_xlstm_ops.schedules.defaults import STEP_TOKENS
from torch_xlstm_ops.schedules.machine import machine
from torch_xlstm_ops.tune import bench, publish, space, study, workloads
from torch_xlstm_ops.tune.objective import Costs, Objective
from torch_xlstm_ops.tune.records import Outcome, Record, Timing
from torch_xlstm_ops.tune.search import Goal, Result, Search

_OPERATOR = {"prefill": workloads.prefill, "train": workloads.train}
_MODEL = {"decode": model_phases.decode, "first-token": model_phases.first_token}


def search(request: TuneRequest) -> int:
    """Search for each length; return 0."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    request.out.mkdir(parents=True, exist_ok=True)
    values = request.values
    goal = Goal(values["trials"], values["time_budget"], values["trial_seconds"])
    store = study.open_store(request.out / study.STORE)
    with _model(request) as loaded:
        for length in values["lengths"]:
            place, bench_ = _bench(request, loaded, length)
            with _SearchDisplay(length, goal.trials) as shown:
                found = Search(
                    _name(request, length), place, bench_, store, method=values["method"], seed=values["seed"],
                    goal=goal, about=_about(request), resume=request.resume, folder=request.out, on_trial=shown.trial,
                ).run()
            _report(request, length, place, found)
    return 0


def ablate(request: TuneRequest) -> int:
    """Change one setting at a time, for each length; return 0."""
    from torch_xlstm_ops.tune import ablate as ablation

    request.out.mkdir(parents=True, exist_ok=True)
    with _model(request) as loaded:
        tables = []
        for length in request.values["lengths"]:
            place, bench_ = _bench(request, loaded, length)
            tables.append(ablation.measure(f"{_phases(request)} {length}", place, bench_,
                                           request.values["trial_seconds"], lambda row: print(row, flush=True)))
        about = {**_about(request), "objective": request.values["objective"]}
        for path in ablation.write(request.out, tables, about):
            print(f"wrote {path}")
    return 0


@contextmanager
def _model(request: TuneRequest) -> Iterator[Loaded | None]:
    """Yield the patched model if a phase runs it, else None."""
    if not request.needs_model:
        yield None
        return
    from torch_xlstm_ops.patch import patch

    loaded = load(request.model, request.device, request.values["dtype"])
    with ExitStack() as undo:
        undo.callback(patch("transformers").remove)
        undo.enter_context(stream.prepared(loaded))
        yield loaded


def _bench(request: TuneRequest, loaded: Loaded | None, length: int) -> tuple[space.Space, bench.Timed]:
    """Return the plans of a length and their measurement.

    Raises EmptySpace if there is no choice.
    """
    B, NH, DHQK, DHHV = request.shape
    wanted = request.values["phase"]
    if set(wanted) == {"decode"}:
        raise space.EmptySpace(f"the space must hold at least two plans, got 1: no setting of a plan changes what runs "
                               f"for a token (up to {STEP_TOKENS} are steps); blend decode with prefill")
    tokens = length if set(wanted) & set(_OPERATOR) else _piece(request, length)
    sizes = workloads.Sizes(B, NH, tokens, DHQK, DHHV)
    held = space.call_bytes(sizes.shape, request.dtype.itemsize, training="train" in wanted)
    limits = space.Limits(bench.held_bytes(request.device), held)
    place = space.Space(sizes.shape, request.device, machine(request.device), limits, request.values["schedules"])
    with config.use(tuned="off"):
        work = [
            _MODEL[phase](loaded, length, weight) if phase in MODEL_PHASES and loaded is not None
            else _OPERATOR[phase](sizes, request.dtype, request.device, weight) for phase, weight in wanted.items()
        ]
    return place, bench.Timed(place, work, costs=Costs(request.device, Objective(request.values["objective"])))


def _piece(request: TuneRequest, length: int) -> int:
    """Return the tokens of a prompt that a model reads in one piece."""
    return stream.pieces(length, request.device)[0]


def kinds(request: TuneRequest, length: int) -> list[tuned_plans.CallKind]:
    """Return the kinds of call whose winner a search of a length finds."""
    B, NH, DHQK, DHHV = request.shape
    wanted = set(request.values["phase"])
    calls = {("training", length)} if "train" in wanted else set()
    calls |= {("forward", length)} if "prefill" in wanted else set()
    calls |= {("forward", _piece(request, length))} if "first-token" in wanted else set()
    return [tuned_plans.call_kind(request.device, request.dtype, B * NH, tokens, DHQK, DHHV, training=use == "training")
            for use, tokens in sorted(calls)]


def _phases(request: TuneRequest) -> str:
    wanted: Mapping[str, float] = request.values["phase"]
    return "+".join(name if len(wanted) == 1 else f"{name}={weight:g}" for name, weight in wanted.items())


def _name(request: TuneRequest, length: int) -> str:
    B, NH, DHQK, DHHV = request.shape
    dtype = dtype_name(request.dtype)
    workload = f"{_phases(request)}-{B}x{NH}x{length}x{DHQK}x{DHHV}-{dtype}-{request.device.type}"
    values = request.values
    return str(study.StudyName(workload, values["method"], values["seed"], Objective(values["objective"])))


def _about(request: TuneRequest) -> dict[str, Any]:
    return {
        "device": tuned_plans.device_name(request.device), "torch": torch.__version__,
        "torch_xlstm_ops": torch_xlstm_ops.__version__,
        "model": request.model.resolve().name if request.needs_model else None,
    }


def _joules(timing: Timing) -> str:
    return "" if timing.joules is None else f", {timing.joules / timing.tokens:.3g} J a token"


def _report(request: TuneRequest, length: int, place: space.Space, found: Result) -> None:
    """Print the result of a search, and save it for schedule auto."""
    settings = publish.settings(place, found)
    rows = [("best", ", ".join(f"{field} {value}" for field, value in settings.items())),
            (Objective(request.values["objective"]).praise, in_words(*found.times_as_fast)),
            *((timing.workload, f"{timing.tokens_per_second:.0f} tok/s{_joules(timing)}") for timing in found.timings)]
    if request.tuned is None:
        rows.append(("kept", "no, as asked"))
    else:
        about = {"phases": _phases(request), "length": length, "method": request.values["method"],
                 "objective": request.values["objective"]}
        kept = publish.publish(request.tuned, kinds(request, length), place, found, about)
        rows.append(("kept", str(request.tuned) if kept else "no: not better than the default beyond noise"))
    print(f"{_name(request, length)}\n{aligned(rows)}")


class _SearchDisplay:
    """Show a search on stderr: a bar with the best plan so far on a terminal, a line for each trial elsewhere."""

    def __init__(self, length: int, trials: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._console = Console(stderr=True)
        columns = (TextColumn(f"{length} tokens"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                   TextColumn("{task.description}"))
        self._bar = Progress(*columns, console=self._console) if self._console.is_terminal else None
        self._task = None if self._bar is None else self._bar.add_task("the default plan", total=trials)

    def __enter__(self) -> _SearchDisplay:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def trial(self, record: Record, running: Search) -> None:
        """Show a finished trial."""
        total = min(running.goal.trials, len(running.space.plans))
        best = f"best {running.best_reward or 0:.2f} times the default: {_short(running)}"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=len(running.known), total=total, description=best)
        elif record.outcome is not Outcome.REPEATED:
            reward = "-" if record.reward is None else f"{record.reward:.2f}"
            self._console.print(f"{len(running.known)} of {total}: {record.outcome} {reward} "
                                f"{_values(record.params)}; {best}", highlight=False, markup=False, soft_wrap=True)


def _short(running: Search) -> str:
    return "-" if running.best is None else _values(running.best.params)


def _values(params: Mapping[str, Any]) -> str:
    return " ".join(f"{field}={value}" for field, value in params.items())
