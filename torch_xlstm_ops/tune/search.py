"""The search: a sampler proposes plans, each is measured beside the best so far, and a store keeps the trials."""

from __future__ import annotations

import dataclasses
import math
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import optuna

from torch_xlstm_ops.maths.intervals import Interval
from torch_xlstm_ops.tune import bench, samplers
from torch_xlstm_ops.tune.records import Files, Outcome, Record, Timing
from torch_xlstm_ops.tune.space import Candidate, Key, Space
from torch_xlstm_ops.tune.study import (
    RECORD,
    RESULT,
    StoreError,
    all_records,
    finish_killed,
    open_study,
    records,
    verdict,
)
from torch_xlstm_ops.tune.workloads import WrongResult

MAX_REPEATS = 10  # proposals of known plans in a row, before an unknown one is drawn at random
NEAR = 0.5  # share of the trials, the last ones, for the plans next to the best


class BudgetTooShort(ValueError):
    """The time budget ended before a trial beside the default plan."""


class Goal(NamedTuple):
    """When to stop a search."""

    trials: int  # plans measured, the default among them
    seconds: float | None = None  # no trial begins later; None: no limit
    trial_seconds: float = 5.0  # for timing one plan


class Result(NamedTuple):
    """The result of a search."""

    best: Candidate
    times_as_fast: Interval  # as fast as the default plan, both measured again at the end
    timings: tuple[Timing, ...]
    faster: bool  # than the default, with 95% confidence


OnTrial = Callable[[Record, "Search"], None]


class Search:
    """One search, which may continue one of a killed process.

    name: of the study. method, seed: of the sampler. folder: for files of every trial; None writes none.
    on_trial: called with each record.
    """

    def __init__(
        self, name: str, space: Space, measures: bench.Bench, store: optuna.storages.BaseStorage, *, method: str,
        seed: int, goal: Goal, about: Mapping[str, Any], resume: bool = False, folder: Path | None = None,
        on_trial: OnTrial = lambda record, search: None,
    ) -> None:
        self.name, self.space, self.goal, self.method, self.seed = name, space, goal, method, seed
        self._bench, self._folder, self._on_trial = measures, folder, on_trial
        sampler = samplers.make(method, trials=goal.trials, seed=seed)
        self.study = open_study(store, name, {**about, "space": space.signature()}, sampler, resume=resume)
        finish_killed(self.study)
        self.records = records(self.study)
        if self.records:  # do not repeat the draws before the kill
            self.study.sampler = samplers.make(method, trials=goal.trials, seed=seed + len(self.records))
        self._random = random.Random(seed + len(self.records))
        self.known: dict[Key, Record] = {tuple(r.key): r for r in self.records if _was_run(r)}
        bests = [r for r in self.records if r.best]
        self.best = space.candidate(bests[-1].params) if bests else None
        self.best_reward = bests[-1].reward if bests else None
        self._files = None if folder is None else Files(folder, all_records(store))

    def run(self) -> Result:
        """Search, measure the best plan beside the default once more, and return the result.

        Raises BudgetTooShort if no plan beside the default was measured.
        """
        end = math.inf if self.goal.seconds is None else time.monotonic() + self.goal.seconds
        began = time.monotonic()
        if self.best is None:
            self.study.enqueue_trial(dict(self.space.default.params))
            trial, candidate = self._ask()
            self._try(trial, candidate, end)
            if self.best is None:
                raise StoreError(f"the default plan failed: {self.records[-1].reason}")
        while len(self.known) < min(self.goal.trials, len(self.space.plans)) and time.monotonic() < end:
            trial, candidate = self._propose()
            self._try(trial, candidate, end)
        if len(self.known) < 2:
            raise BudgetTooShort(f"--time-budget must be enough for one trial beside the default plan, got "
                                 f"{self.goal.seconds:g} s: the default alone took {time.monotonic() - began:.1f} s")
        return self._confirm()

    def _try(self, trial: optuna.Trial, candidate: Candidate, end: float) -> None:
        """Measure a plan and keep its record."""
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
        """Measure the best plan and the default once more, for twice as long, and store the result."""
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
        """Return a trial of an unknown plan; a known one that the sampler proposes gets its known result.

        The last trials go to the plans next to the best so far, with every method.
        """
        near = self.method != "grid" and len(self.known) >= (1 - NEAR) * self.goal.trials
        for _ in range(0 if near or self.method == "grid" else MAX_REPEATS):
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
        """Tell the sampler the known result of a plan."""
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
        """Write a trial to the store, then to the files, and call `on_trial`."""
        record = dataclasses.replace(record, ended=time.time())
        trial.set_user_attr(RECORD, record.as_json())
        self.study.tell(trial, *verdict(record))
        self.records.append(record)
        if self._files is not None:
            self._files.add(record)
        self._on_trial(record, self)


def _was_run(record: Record) -> bool:
    """Return whether a plan was run in a trial."""
    return record.outcome in (Outcome.MEASURED, Outcome.WRONG, Outcome.FAILED)
