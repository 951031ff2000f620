"""Laws of the search: no plan twice, none that cannot run, no best plan by noise, at most one trial lost by a kill."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_xlstm_ops.maths.intervals import INTERVAL_ROUNDS, Interval, median, product
from torch_xlstm_ops.schedules.plan import Machine, Shape
from torch_xlstm_ops.tune import measure, samplers
from torch_xlstm_ops.tune.bench import Measured
from torch_xlstm_ops.tune.records import Outcome, Record, from_json
from torch_xlstm_ops.tune.search import BudgetTooShort, Goal, Search
from torch_xlstm_ops.tune.space import Candidate, EmptySpace, Limits, Space
from torch_xlstm_ops.tune.study import StoreError, open_store, records
from torch_xlstm_ops.tune.workloads import WrongResult

optuna.logging.set_verbosity(optuna.logging.ERROR)
CPU = torch.device("cpu")
NO_LIMITS = Limits(None, 0)


def space(rows: int = 4, tokens: int = 1024, *, threads: int = 2, limits: Limits = NO_LIMITS) -> Space:
    return Space(Shape(rows, tokens, 64, 64), CPU, Machine(threads), limits)


class Table:
    """A bench that knows how fast every plan is: small chunks and many workers are fast here."""

    def __init__(self, log: Callable[[Candidate], None] = lambda candidate: None) -> None:
        self.measured: list[Candidate] = []
        self._log = log

    def speed(self, candidate: Candidate) -> float:
        plan = candidate.plan
        return plan.workers + 16 / plan.chunk_size + plan.segment / 4096 + plan.band / 100

    def measure(self, challenger: Candidate, best: Candidate | None, seconds: float) -> Measured:
        self._log(challenger)
        self.measured.append(challenger)
        ratio = 1.0 if best is None else self.speed(challenger) / self.speed(best)
        return Measured(Interval(ratio, ratio / 1.001, ratio * 1.001), (), 0.0, None)

    def trace(self, candidate: Candidate, path: Path) -> None:
        path.write_text("{}")


def search(bench: Any, *, method: str = "random", seed: int = 0, trials: int = 12, **more: Any) -> Search:
    store = more.pop("store", None) or optuna.storages.InMemoryStorage()
    goal = Goal(trials, more.pop("seconds", None), 0.1)
    about = more.pop("about", {"torch": "2"})
    name, place = more.pop("name", "study"), more.pop("space", None) or space()
    return Search(name, place, bench, store, method=method, seed=seed, goal=goal, about=about, **more)


# Space


def test_the_default_plan_is_in_the_space_and_no_plan_is_there_twice() -> None:
    found = space()
    assert found.default.key in found.plans
    assert found.default.plan.schedule == "inductor"
    assert len({str(c.plan) for c in found.plans.values()}) == len(found.plans)
    assert all(found.candidate(c.params).key == key for key, c in found.plans.items())


def test_settings_that_an_inductor_plan_does_not_read_make_no_new_plan() -> None:
    found = space()
    inductor = [c for c in found.plans.values() if c.plan.schedule == "inductor"]
    assert {c.params["workers"] for c in inductor} == {1}


@given(st.integers(1, 6), st.integers(5, 4000), st.integers(1, 4), st.sampled_from(["cpu", "cuda", "mps"]))
@settings(max_examples=8)
def test_every_choice_is_used_by_some_plan(rows: int, tokens: int, threads: int, device: str) -> None:
    found = Space(Shape(rows, tokens, 64, 64), torch.device(device), Machine(threads, device == "cuda"), NO_LIMITS)
    for field, values in found.choices.items():
        assert len(values) > 1
        assert {c.params[field] for c in found.plans.values()} == set(values), field


def test_the_memory_model_refuses_before_anything_runs() -> None:
    whole = space()
    most = whole.needed_bytes(whole.default.plan)
    found = space(limits=Limits(most, 0))
    assert 0 < len(found.plans) < len(whole.plans)
    assert all(found.needed_bytes(c.plan) <= most for c in found.plans.values())
    bench = Table()
    tried = search(bench, space=found, trials=1000)
    tried.run()
    assert {c.key for c in bench.measured} == set(found.plans)
    refused = [r for r in tried.records if r.outcome is Outcome.REFUSED]
    assert refused
    assert all("MB needed" in r.reason or "chunks a segment" in r.reason for r in refused)


@pytest.mark.parametrize(("rows", "tokens", "limits"), [(4, 1, NO_LIMITS), (1, 4, NO_LIMITS), (4, 1024, Limits(1, 0))])
def test_an_empty_space_says_so(rows: int, tokens: int, limits: Limits) -> None:
    with pytest.raises(EmptySpace, match="the space must hold"):
        space(rows, tokens, threads=1, limits=limits)


# Measuring


def test_the_interval_of_a_median_is_not_moved_by_one_slow_round() -> None:
    times = [10.0 + 0.01 * i for i in range(20)]
    found = median([*times[:-1], 1000.0])
    assert found.low <= found.value <= found.high < 11
    assert median(times[:5]).high == math.inf


@given(st.integers(0, 1000))
def test_nineteen_intervals_of_twenty_hold_the_median(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(200, 25, generator=generator).tolist()
    held = sum(i.low <= 0.5 <= i.high for i in map(median, draws))
    assert held >= 176  # of 200: 190 expected, and 4.5 deviations


def test_measuring_goes_on_until_it_is_precise_or_the_time_is_up() -> None:
    clocks = [lambda: 1.0, lambda: 2.0]
    taken = measure.turns(clocks, measure.until(60, lambda taken: measure.ratios(taken).relative < 0.02))
    assert [len(times) for times in taken] == [INTERVAL_ROUNDS] * 2
    assert measure.ratios(taken) == (2.0, 2.0, 2.0)
    assert len(measure.turns(clocks, measure.until(0, lambda taken: False))[0]) == measure.MIN_ROUNDS


def test_turns_are_taken_forth_and_back() -> None:
    order: list[str] = []
    clocks = [lambda n=name: (order.append(n), 1.0)[1] for name in "ab"]
    measure.turns(clocks, lambda taken: len(taken[0]) == 3)
    assert "".join(order) == "abbaab"


def test_several_workloads_give_the_weighted_mean_of_speeds() -> None:
    sure = product([(Interval(4.0, 4.0, 4.0), 1.0), (Interval(1.0, 1.0, 1.0), 1.0)])
    assert sure == pytest.approx((2.0, 2.0, 2.0))
    unsure = product([(Interval(2.0, 0.0, math.inf), 1.0)])
    assert unsure.value == pytest.approx(2.0)
    assert (unsure.low, unsure.high) == (0.0, math.inf)


# Searching


@pytest.mark.smoke
@pytest.mark.parametrize("method", samplers.METHODS)
def test_every_method_measures_each_plan_once_and_finds_the_best_given_the_trials(method: str) -> None:
    bench, whole = Table(), space(2, 128)
    tried = search(bench, method=method, trials=1000, space=whole)
    result = tried.run()
    *measured, best, = bench.measured
    assert sorted(c.key for c in measured) == sorted(whole.plans)
    assert best.key == result.best.key == max(whole.plans.values(), key=bench.speed).key
    assert bench.measured[0].key == whole.default.key
    assert result.faster
    assert result.times_as_fast.value == pytest.approx(bench.speed(best) / bench.speed(whole.default))


@pytest.mark.parametrize("method", ["random", "ga", "tpe", "bandit", "boltzmann"])
def test_a_seed_repeats_a_search(method: str) -> None:
    found = []
    for _ in range(2):
        bench = Table()
        search(bench, method=method, seed=3).run()
        found.append([c.key for c in bench.measured])
    assert found[0] == found[1]


@pytest.mark.parametrize("method", ["tpe", "bandit", "boltzmann"])
def test_methods_that_learn_do_better_than_chance(method: str) -> None:
    def mean(method: str) -> float:
        rewards = []
        for seed in range(3):
            tried = search(Table(), method=method, seed=seed, trials=25)
            tried.run()
            rewards += [r.reward for r in tried.records if r.outcome is Outcome.MEASURED]
        return sum(rewards) / len(rewards)

    assert mean(method) > 1.05 * mean("random")


def test_the_temperature_falls() -> None:
    boltzmann = samplers.Boltzmann(0, trials=10)
    temperatures = [boltzmann.temperature(n) for n in range(12)]
    assert temperatures == sorted(temperatures, reverse=True)
    assert (temperatures[0], temperatures[-1]) == (samplers.HOT, pytest.approx(samplers.COLD))


def test_noise_makes_no_best_plan() -> None:
    class Noise(Table):
        def measure(self, challenger: Candidate, best: Candidate | None, seconds: float) -> Measured:
            return Measured(Interval(1.01, 0.99, 1.03), (), 0.0, None)

    tried = search(Noise())
    result = tried.run()
    assert not result.faster
    assert result.best.key == tried.space.default.key


def test_a_plan_that_is_wrong_or_fails_is_recorded_with_its_reason_and_never_best() -> None:
    class Broken(Table):
        def measure(self, challenger: Candidate, best: Candidate | None, seconds: float) -> Measured:
            if challenger.plan.chunk_size == 16:
                raise WrongResult("results must be right")
            if challenger.plan.chunk_size == 32:
                raise MemoryError("no room")
            return super().measure(challenger, best, seconds)

    tried = search(Broken(), trials=1000)
    result = tried.run()
    assert result.best.plan.chunk_size == 64
    reasons = {r.reason for r in tried.records if r.outcome in (Outcome.WRONG, Outcome.FAILED)}
    assert reasons == {"WrongResult: results must be right", "MemoryError: no room"}
    assert len(tried.known) == len(tried.space.plans)


def test_a_default_plan_that_does_not_run_ends_the_search() -> None:
    class Broken(Table):
        def measure(self, challenger: Candidate, best: Candidate | None, seconds: float) -> Measured:
            raise MemoryError("no room")

    with pytest.raises(StoreError, match="the default plan failed: MemoryError: no room"):
        search(Broken()).run()


def test_a_budget_too_short_for_one_trial_says_so() -> None:
    with pytest.raises(BudgetTooShort, match="got 0 s: the default alone took"):
        search(Table(), seconds=0.0).run()


# What is kept


@pytest.mark.smoke
def test_every_trial_is_in_both_files_and_comes_back(tmp_path: Path) -> None:
    tried = search(Table(), folder=tmp_path, trials=8)
    tried.run()
    lines = (tmp_path / "trials.jsonl").read_text().splitlines()
    assert [from_json(json.loads(line)) for line in lines] == tried.records
    table = (tmp_path / "trials.csv").read_text().splitlines()
    assert len(table) == len(lines) + 1
    measured = [r for r in tried.records if r.outcome is Outcome.MEASURED]
    assert len(measured) == 8
    assert all((tmp_path / r.trace).exists() for r in measured if r.trace is not None)


def test_the_files_of_a_folder_hold_all_its_searches(tmp_path: Path) -> None:
    store = open_store(tmp_path / "study.sqlite")
    for name in ("a", "b"):
        search(Table(), name=name, store=store, folder=tmp_path, trials=3).run()
    lines = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    assert [line["study"] for line in lines if line["outcome"] == "measured"] == ["a"] * 3 + ["b"] * 3


def test_a_search_killed_before_its_first_trial_can_be_resumed(tmp_path: Path) -> None:
    store = open_store(tmp_path / "study.sqlite")
    optuna.create_study(storage=store, study_name="study", direction="maximize")
    assert search(Table(), store=store, resume=True, trials=3).run().best


def test_a_search_resumes_where_it_ended(tmp_path: Path) -> None:
    store = open_store(tmp_path / "study.sqlite")
    first, second = Table(), Table()
    search(first, store=store, trials=4).run()
    tried = search(second, store=open_store(tmp_path / "study.sqlite"), trials=9, resume=True)
    result = tried.run()
    keys = [c.key for c in (*first.measured[:-1], *second.measured[:-1])]  # the last confirms
    assert len(set(keys)) == len(keys) == 9
    assert second.speed(result.best) == max(map(second.speed, (*first.measured, *second.measured)))


KILLED = """
import sys, time
from pathlib import Path
from tests.test_tune import Table, search, open_store
folder = Path(sys.argv[1])
def log(candidate):
    with (folder / "begun").open("a") as file:
        file.write(f"{candidate.key}\\n")
    time.sleep(0.02)
search(Table(log), store=open_store(folder / "study.sqlite"), trials=int(sys.argv[2]), resume=True, folder=folder,
       method="tpe", on_trial=lambda record, search: print(record.outcome.value, flush=True)).run()
"""


def test_a_kill_loses_one_trial_at_most(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    for kept in (2, 5):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path), "12"], cwd=root, text=True,
                                   stdout=subprocess.PIPE)
        assert process.stdout is not None
        giving_up = threading.Timer(300, process.kill)
        giving_up.start()
        try:
            for line in process.stdout:
                kept -= line == "measured\n"
                if kept == 0:
                    break
        finally:
            process.kill()  # SIGKILL, at whatever it is doing
            giving_up.cancel()
        process.wait(60)
        process.stdout.close()
    begun_before = (tmp_path / "begun").read_text().splitlines()
    seen: list[Record] = []
    bench = Table()
    tried = search(bench, store=open_store(tmp_path / "study.sqlite"), trials=12, resume=True, folder=tmp_path,
                   method="tpe", on_trial=lambda record, search: seen.append(record))
    tried.run()
    again = {str(c.key) for c in bench.measured[:-1]} & set(begun_before)
    lost = len(begun_before) - (12 - (len(bench.measured) - 1))
    assert 0 <= lost <= 2  # one for each kill
    assert len(again) <= 2
    assert len(tried.known) == 12
    assert len(tried.records) == len(records(tried.study)) == len((tmp_path / "trials.jsonl").read_text().splitlines())
    assert seen


def test_an_existing_study_needs_resume(tmp_path: Path) -> None:
    store = open_store(tmp_path / "study.sqlite")
    search(Table(), store=store, trials=3).run()
    with pytest.raises(StoreError, match="come with --resume"):
        search(Table(), store=store)


@pytest.mark.parametrize(("about", "named"), [({"torch": "3"}, "torch"), ({"torch": "2", "device": "b"}, "device")])
def test_a_store_of_another_version_is_refused(tmp_path: Path, about: dict[str, str], named: str) -> None:
    store = open_store(tmp_path / "study.sqlite")
    search(Table(), store=store, trials=3).run()
    with pytest.raises(StoreError, match=f"the store must be of this {named} to go on"):
        search(Table(), store=store, about=about, resume=True)
    with pytest.raises(StoreError, match="the store must be of this space to go on"):
        search(Table(), store=store, space=space(2), resume=True)


def test_a_file_that_is_no_store_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "study.sqlite"
    path.write_text("not a database, whatever its name says" * 100)
    with pytest.raises(StoreError, match="must be a store of this version of optuna"):
        open_store(path)


def test_a_store_of_another_optuna_is_refused(tmp_path: Path) -> None:
    import sqlite3

    path = tmp_path / "study.sqlite"
    search(Table(), store=open_store(path), trials=3).run()
    with sqlite3.connect(path) as database:
        database.execute("UPDATE version_info SET schema_version = 1")
        database.execute("UPDATE alembic_version SET version_num = 'v0.9.0.a'")
    database.close()
    with pytest.raises(StoreError, match="must be a store of this version of optuna"):
        open_store(path)
