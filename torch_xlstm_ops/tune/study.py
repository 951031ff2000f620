"""The search: plans asked of a sampler, measured beside the best so far, and kept in a store that survives a kill."""

from __future__ import annotations

import dataclasses
import math
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from optuna.trial import TrialState

from torch_xlstm_ops.tune import bench, samplers
from torch_xlstm_ops.tune.measure import Interval
from torch_xlstm_ops.tune.records import Files, Outcome, Record, Timing, from_json
from torch_xlstm_ops.tune.space import Candidate, Key, Space
from torch_xlstm_ops.tune.workloads import WrongResult

STORE = "study.sqlite"  # in a folder of searches
VERSION = 1  # of what a study holds
PATIENCE = 10  # proposals of plans already known, one after another, before a new one is drawn at random
NEAR = 0.5  # of the trials, the last, go to the plans next to the best
RECORD, ABOUT, RESULT = "record", "about", "result"  # attributes in the store


class StoreError(RuntimeError):
    """A store cannot be used."""


class BudgetTooShort(ValueError):
    """There was no time for a trial."""


class Goal(NamedTuple):
    """How long to search."""

    trials: int  # plans measured, the default among them
    seconds: float | None = None  # no trial begins later; None: however long it takes
    trial_seconds: float = 5.0  # for the timing of one plan


class Result(NamedTuple):
    """What a search ends with."""

    best: Candidate
    times_as_fast: Interval  # as the default plan, both measured again at the end
    timings: tuple[Timing, ...]
    faster: bool  # beyond noise


Watch = Callable[[Record, "Search"], None]


def open_store(path: Path) -> optuna.storages.RDBStorage:
    """Return the SQLite store in a file, made if it is not there.

    Raises StoreError for a file that is none, or one that another version of optuna wrote.
    """
    try:
        return optuna.storages.RDBStorage(f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": 60}})
    except Exception as error:  # sqlalchemy's DatabaseError, optuna's RuntimeError, alembic's CommandError
        reason = " ".join(str(error).split())[:200]
        raise StoreError(f"{path} must be a store of this version of optuna ({optuna.__version__}), got "
                         f"{type(error).__name__}: {reason}") from error


def open_study(
    store: optuna.storages.BaseStorage, name: str, about: Mapping[str, Any], sampler: Any, *, resume: bool
) -> optuna.Study:
    """Return a study by its name, made if it is not there.

    about: what it was, and must still be, measured on and with.
    Raises StoreError if it is there and not to be resumed, or was about something else.
    """
    there = name in names(store)
    if there and not resume:
        raise StoreError(f"--out must be a folder without the study {name}, or come with --resume")
    study = optuna.create_study(storage=store, study_name=name, sampler=sampler, direction="maximize",
                                load_if_exists=True)
    wanted = {"version": VERSION, **about}
    if ABOUT not in study.user_attrs and not study.get_trials(deepcopy=False):  # new, or killed before this line
        study.set_user_attr(ABOUT, wanted)
    found = study.user_attrs.get(ABOUT, {})
    for key in {**wanted, **found}:
        if found.get(key) != wanted.get(key):
            raise StoreError(f"the store must be of this {key} to go on, {wanted.get(key)!r}, got {found.get(key)!r}: "
                             f"start anew in another --out")
    return study


def names(store: optuna.storages.BaseStorage) -> list[str]:
    """Return the names of a store's studies."""
    found: list[str] = optuna.study.get_all_study_names(store)
    return found


def everything(store: optuna.storages.BaseStorage) -> list[Record]:
    """Return the trials of all a store's studies that are over."""
    return [record for name in names(store) for record in records(optuna.load_study(study_name=name, storage=store))]


def records(study: optuna.Study) -> list[Record]:
    """Return the trials of a study that are over."""
    return [from_json(trial.user_attrs[RECORD]) for trial in study.get_trials(deepcopy=False)
            if RECORD in trial.user_attrs and trial.state.is_finished()]


class Search:
    """One search, perhaps begun by a process that was killed.

    name: of the study. method, seed: of the sampler. folder: for files of every trial; None writes none.
    """

    def __init__(
        self, name: str, space: Space, measures: bench.Bench, store: optuna.storages.BaseStorage, *, method: str,
        seed: int, goal: Goal, about: Mapping[str, Any], resume: bool = False, folder: Path | None = None,
        watch: Watch = lambda record, search: None,
    ) -> None:
        self.name, self.space, self.goal, self.method, self.seed = name, space, goal, method, seed
        self._bench, self._folder, self._watch = measures, folder, watch
        sampler = samplers.make(method, trials=goal.trials, seed=seed)
        self.study = open_study(store, name, {**about, "space": space.signature()}, sampler, resume=resume)
        self._finish_killed()
        self.records = records(self.study)
        if self.records:  # not what was drawn before
            self.study.sampler = samplers.make(method, trials=goal.trials, seed=seed + len(self.records))
        self._random = random.Random(seed + len(self.records))
        self.known: dict[Key, Record] = {tuple(r.key): r for r in self.records if _counts(r)}
        bests = [r for r in self.records if r.best]
        self.best = space.candidate(bests[-1].params) if bests else None
        self.best_reward = bests[-1].reward if bests else None
        self._files = None if folder is None else Files(folder, everything(store))

    def run(self) -> Result:
        """Search, measure the best beside the default once more, and return what came of it.

        Raises BudgetTooShort if not one plan beside the default could be measured.
        """
        end = math.inf if self.goal.seconds is None else time.monotonic() + self.goal.seconds
        began = time.monotonic()
        if self.best is None:
            self.study.enqueue_trial(dict(self.space.default.params))
            trial, candidate = self._ask()
            self._try(trial, candidate, end)
            if self.best is None:
                raise StoreError(f"the default plan must run, got {self.records[-1].reason}")
        while len(self.known) < min(self.goal.trials, len(self.space.plans)) and time.monotonic() < end:
            trial, candidate = self._propose()
            self._try(trial, candidate, end)
        if len(self.known) < 2:
            raise BudgetTooShort(f"--time-budget must be enough for one trial beside the default plan, got "
                                 f"{self.goal.seconds:g} s: the default alone took {time.monotonic() - began:.1f} s")
        return self._confirm()

    def _try(self, trial: optuna.Trial, candidate: Candidate, end: float) -> None:
        """Measure a plan and keep what was found."""
        began, load = time.monotonic(), bench.load_average()
        seconds = max(0.0, min(self.goal.trial_seconds, end - began))
        record = self._record(trial, candidate, Outcome.MEASURED, load_average=load)
        try:
            found = self._bench.measure(candidate, self.best, seconds)
        except Exception as error:  # a plan that does not run is a result
            outcome = Outcome.WRONG if isinstance(error, WrongResult) else Outcome.FAILED
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
            record = dataclasses.replace(record, outcome=outcome, reason=reason)
        else:
            record = self._judge(record, found)
            if self._folder is not None:
                path = self._folder / "traces" / f"{self.name}-{trial.number}.json"
                path.parent.mkdir(exist_ok=True)
                self._bench.trace(candidate, path)
                record = dataclasses.replace(record, trace=str(path.relative_to(self._folder)))
        self.known[candidate.key] = record = dataclasses.replace(record, seconds=time.monotonic() - began)
        if record.best:
            self.best, self.best_reward = candidate, record.reward
        self._keep(trial, record)

    def _judge(self, record: Record, found: bench.Measured) -> Record:
        reward = found.times_as_fast.scaled(1.0 if self.best_reward is None else self.best_reward)
        low, high = (value if value and math.isfinite(value) else None for value in reward[1:])
        return dataclasses.replace(
            record, reward=reward.value, reward_low=low, reward_high=high, timings=found.timings,
            best=self.best is None or found.times_as_fast.low > 1, warm_up_s=found.warm_up_s,
            peak_bytes=found.peak_bytes,
        )

    def _confirm(self) -> Result:
        """Measure the best plan and the default once more, twice as long, and keep what was found."""
        assert self.best is not None
        default = self.space.default
        found = self._bench.measure(self.best, default, 2 * self.goal.trial_seconds)
        same = self.best.key == default.key
        speed = Interval(1.0, 1.0, 1.0) if same else found.times_as_fast
        kept = {"params": self.best.params, "plan": str(self.best.plan), "times_as_fast": [speed.value, *(
            value if math.isfinite(value) else None for value in speed[1:])],
            "timings": [dataclasses.asdict(timing) for timing in found.timings]}
        self.study.set_user_attr(RESULT, kept)
        return Result(self.best, speed, found.timings, faster=speed.low > 1)

    def _propose(self) -> tuple[optuna.Trial, Candidate]:
        """Return a trial of a plan that has not been measured; what the sampler repeats is answered from memory.

        The last trials go to the plans next to the best so far, whatever the method.
        """
        near = self.method != "grid" and len(self.known) >= (1 - NEAR) * self.goal.trials
        for _ in range(0 if near or self.method == "grid" else PATIENCE):
            trial, candidate = self._ask()
            if candidate.key in self.space.plans and candidate.key not in self.known:
                return trial, candidate
            self._answer(trial, candidate)
        unknown = [candidate for key, candidate in self.space.plans.items() if key not in self.known]
        self._random.shuffle(unknown)
        if near and self.best is not None:
            best = self.space.plans.get(self.best.key, self.best)
            unknown.sort(key=lambda candidate: self.space.distance(candidate, best))
        self.study.enqueue_trial(dict(unknown[0].params))
        return self._ask()

    def _answer(self, trial: optuna.Trial, candidate: Candidate) -> None:
        """Tell the sampler what is known of a plan already."""
        before = self.known.get(candidate.key)
        if before is None:
            record = self._record(trial, candidate, Outcome.REFUSED, reason=self.space.refused[candidate.key])
        else:
            record = self._record(trial, candidate, Outcome.REPEATED, reward=before.reward,
                                  reason=f"runs as trial {before.number}")
        self._keep(trial, record)

    def _ask(self) -> tuple[optuna.Trial, Candidate]:
        trial = self.study.ask()
        params = {name: trial.suggest_categorical(name, choices) for name, choices in self.space.choices.items()}
        return trial, self.space.candidate(params)

    def _record(self, trial: optuna.Trial, candidate: Candidate, outcome: Outcome, **more: Any) -> Record:
        return Record(
            study=self.name, number=trial.number, method=self.method, seed=self.seed, outcome=outcome,
            params=dict(candidate.params), key=list(candidate.key), plan=str(candidate.plan),
            estimated_bytes=self.space.needed_bytes(candidate.plan), **more,
        )

    def _keep(self, trial: optuna.Trial, record: Record) -> None:
        """Put a trial into the store, and then into the files and on the screen."""
        record = dataclasses.replace(record, ended=time.time())
        trial.set_user_attr(RECORD, record.as_json())
        self.study.tell(trial, *_verdict(record))
        self.records.append(record)
        if self._files is not None:
            self._files.add(record)
        self._watch(record, self)

    def _finish_killed(self) -> None:
        """End the trials of a process that was killed: by their record if they have one, else as failed."""
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if RECORD in trial.user_attrs:
                self.study.tell(trial.number, *_verdict(from_json(trial.user_attrs[RECORD])))
            else:
                self.study.tell(trial.number, state=TrialState.FAIL)


def _verdict(record: Record) -> tuple[float | None, TrialState]:
    """Return what optuna is told of a trial."""
    if record.reward is not None:
        return record.reward, TrialState.COMPLETE
    return None, TrialState.PRUNED if record.outcome is Outcome.REFUSED else TrialState.FAIL


def _counts(record: Record) -> bool:
    """Return whether a trial was run."""
    return record.outcome in (Outcome.MEASURED, Outcome.WRONG, Outcome.FAILED)
