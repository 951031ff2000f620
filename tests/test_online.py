"""Laws of tuning in use: lost time stays within the budget, the faster plan wins, and results and files stay right."""

from __future__ import annotations

import functools
import json
import math
import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import online as benchmark
from benchmarks import online_live, online_overhead
from benchmarks.online_scenarios import scenarios
from tests.oracle import Sizes, draw
from torch_xlstm_ops import config, trace
from torch_xlstm_ops.api import mlstm_chunkwise
from torch_xlstm_ops.config import Config, Schedule, Tune, tuned_plans
from torch_xlstm_ops.maths.intervals import Interval
from torch_xlstm_ops.maths.tolerance import GRADIENT_TOLERANCE, TOLERANCE, error
from torch_xlstm_ops.ops.mlstm import dispatch
from torch_xlstm_ops.runtime import files
from torch_xlstm_ops.schedules import plan
from torch_xlstm_ops.schedules.online import arms, keep, learner, policies, policy, timer
from torch_xlstm_ops.schedules.online.budget import Budget
from torch_xlstm_ops.schedules.online.controller import Arm, Change, Controller
from torch_xlstm_ops.schedules.online.estimates import Estimates, View

POLICIES = [tune for tune in Tune if tune not in (Tune.OFF, Tune.ONLINE)]
SIZES = Sizes(S=40)
CPU = torch.device("cpu")


class InTurn(policy.Policy):
    """Tries every plan that it may, one after another."""

    name = "in turn"

    def __init__(self) -> None:
        self._calls = 0

    def choose(self, view: View, draws: random.Random) -> int:
        self._calls += 1
        return view.allowed[self._calls % len(view.allowed)]


class Simulated:
    """A controller with plans that take so many seconds, with noise."""

    def __init__(
        self, seconds: dict[str, float], chooser: policy.Policy, *, part: float = 0.02, noise: float = 0.02,
        compiles: tuple[str, ...] = (),
    ) -> None:
        self.seconds, self._noise, self._draws = seconds, noise, random.Random(1)
        self.budget = Budget(part)
        self.controller = Controller([Arm(n, 5.0 if n in compiles else 0.0) for n in seconds], chooser, self.budget)
        self._cold = set(compiles)
        self.chosen: list[str] = []
        self.changes: list[Change] = []

    def run(self, calls: int) -> None:
        for _ in range(calls):
            decision = self.controller.decide()
            name = self.controller.arms[decision.arm].name
            self.chosen.append(name)
            took = self.seconds[name] * math.exp(self._draws.gauss(0, self._noise)) + 5.0 * (name in self._cold)
            change = self.controller.observe(decision.arm, took, 1, compiled=name in self._cold)
            self._cold.discard(name)
            self.changes += [] if change is None else [change]

    @property
    def best(self) -> str:
        return self.controller.arms[self.controller.leader].name


@pytest.mark.parametrize("tune", POLICIES)
def test_the_fastest_plan_is_found_and_followed_when_another_becomes_it(tune: Tune) -> None:
    found = Simulated({"default": 0.010, "better": 0.008, "worse": 0.012}, policies.make(tune))
    found.run(1500)
    assert found.best == "better"
    found.seconds = {"default": 0.010, "better": 0.014, "worse": 0.007}
    found.run(6000)
    assert found.best == "worse"
    assert found.chosen[-100:].count("worse") > 80


@pytest.mark.parametrize("tune", POLICIES)
def test_lost_time_stays_within_the_budget(tune: Tune) -> None:
    found = Simulated({"default": 0.010, "slow": 0.013, "slower": 0.019}, policies.make(tune))
    for _ in range(20):
        found.run(100)
        assert found.budget.lost <= 0.02 * found.budget.spent + 0.01
    assert found.best == "default"
    assert {"slow", "slower"} <= set(found.chosen)


def test_a_compilation_counts_as_lost_and_waits_until_the_budget_admits_it() -> None:
    found = Simulated({"default": 0.1, "compiled": 0.05}, policies.Thompson(), part=0.1, compiles=("compiled",))
    found.run(400)
    assert "compiled" not in found.chosen
    found.run(400)
    assert found.chosen.index("compiled") >= 500
    assert found.budget.lost >= 4.9
    assert found.best == "compiled"


def test_kernels_of_a_plan_serve_another_kind_of_call() -> None:
    budget = Budget()
    assert budget.compile_seconds("a", 5.0) == 5.0
    budget.note_kernels("a", 3.0)
    assert budget.compile_seconds("a", 5.0) == 0.0
    assert budget.compile_seconds("b", 5.0) == 3.0
    assert budget.compile_seconds("b", 0.0) == 0.0


def test_a_trial_is_between_calls_of_the_best_plan() -> None:
    found = Simulated({"default": 0.01, "other": 0.01}, InTurn(), part=10.0)
    found.run(500)
    trials = [index for index, name in enumerate(found.chosen) if name == "other"]
    assert len(trials) > 100
    assert all(found.chosen[index - 1] == "default" == found.chosen[index + 1] for index in trials[:-1])


def test_a_plan_as_fast_as_the_best_does_not_replace_it() -> None:
    found = Simulated({"default": 0.01, "same": 0.01}, InTurn(), part=10.0)
    found.run(2000)
    assert not found.changes


def test_a_plan_that_fails_is_not_tried_again_and_its_time_is_lost() -> None:
    found = Simulated({"default": 0.01, "broken": 0.01}, InTurn(), part=10.0)
    found.run(20)
    lost = found.budget.lost
    found.controller.fail(1, 2.0, "no memory")
    assert found.budget.lost == lost + 2.0
    found.chosen.clear()
    found.run(100)
    assert set(found.chosen) == {"default"}


def test_a_best_plan_that_fails_gives_way_to_the_default() -> None:
    found = Simulated({"default": 0.02, "better": 0.01}, InTurn(), part=10.0)
    found.run(100)
    assert found.best == "better"
    found.controller.fail(1, 0.0, "no memory")
    assert found.best == "default"
    assert found.controller.decide().reason.startswith("better failed (no memory)")


def test_observations_count_half_after_the_half_life() -> None:
    estimates = Estimates(2, half_life=10)
    for call in (0, 0, 0, 0):
        estimates.add(1, 0.2, call)
    assert estimates.count(1, 10) == pytest.approx(2)
    assert estimates.mean(1) == pytest.approx(0.2)
    estimates.lead(1, 0, 10)
    assert [estimates.mean(plan) for plan in (0, 1)] == [pytest.approx(-0.2), 0]


def test_a_call_of_little_time_asks_no_policy() -> None:
    found = Simulated({"default": 1e-5, "other": 1e-6}, InTurn(), part=10.0)
    found.run(150)
    assert found.chosen.count("other") <= 2


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_plans_without_new_kernels_come_first_and_what_the_user_set_stays(device: str) -> None:
    shape = plan.Shape(8, 4096, 64, 64)
    at = functools.partial(arms.candidates, shape=shape, device=torch.device(device))
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device, whose memory the plans depend on")
    found = at(Config(), Config())
    assert found[0] == ("default", {}, False)
    assert len(found) > 3
    assert [c.compiles for c in found] == sorted(c.compiles for c in found)
    kept = at(Config(chunk_size=32), Config(chunk_size=32))
    assert {c.settings.get("chunk_size") for c in kept} == {None}
    assert not at(Config(schedule=Schedule.INDUCTOR), Config(schedule=Schedule.INDUCTOR))
    assert not arms.candidates(Config(), Config(), shape._replace(tokens=2), torch.device(device))


def test_after_offline_tuning_the_default_is_tried_too() -> None:
    used = Config(schedule=Schedule.QUEUED, workers=1, segment=256)
    found = arms.candidates(Config(), used, plan.Shape(8, 4096, 64, 64), CPU)
    assert found[0].name == "tuned"
    assert "default" in [c.name for c in found]
    for candidate in found:  # what is kept of any of them can be used later
        if candidate.name != "default":
            entry = keep.entry(candidate.settings, Interval(1.1, 1.05, 1.2), "")
            assert tuned_plans.checked(json.loads(json.dumps(entry)), "it") == dict(candidate.settings)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Keep tuned plans in a file of the test's own, and try every plan in turn; the last one is the fastest."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(policies, "make", lambda tune: InTurn())
    monkeypatch.setattr(learner, "Budget", lambda: Budget(100.0))

    def few(*args: object, gradient: bool) -> list[arms.Candidate]:
        settings = {"schedule": Schedule.INDUCTOR, "heads_per_band": 1}
        return [arms.Candidate("default", {}), arms.Candidate("heads_per_band 1", settings)]

    def run(self: timer.Timer, call: Callable[[], object], told: timer.Told) -> object:
        told(0.01 / (1 + told.args[0]), False)  # type: ignore[attr-defined]
        return call()

    monkeypatch.setattr(arms, "candidates", few)
    monkeypatch.setattr(timer.Timer, "run", run)
    forget()
    yield tmp_path / "torch_xlstm_ops" / "tuned.json"
    forget()


def forget() -> None:
    config.reload(flags={})
    tuned_plans.forget()
    dispatch.forget()
    learner.forget()


def test_results_are_the_same_the_trace_has_every_decision_and_the_winner_is_kept(file: Path) -> None:
    args = draw(SIZES, state=False)
    expected, _ = mlstm_chunkwise(*args)
    with config.use(tune="online"), trace.record() as recording:
        for _ in range(30):
            h, _ = mlstm_chunkwise(*args)
            assert error([h], [expected.double()]) <= 2 * TOLERANCE[h.dtype]
    told = [span.details for span in recording.entries() if span.op == learner.OP]
    assert len(told) == 30
    assert any(details.startswith("heads_per_band 1: a trial by in turn") for details in told if details)
    assert any("is now the best so far" in details for details in told if details)
    (entry,) = tuned_plans.read(file).values()
    assert entry["settings"] == {"schedule": "inductor", "heads_per_band": 1}
    assert entry["method"] == "online"
    forget()
    with trace.record() as recording:  # another process, without tuning in use
        mlstm_chunkwise(*args)
    assert {span.band for span in recording.entries()} == set(range(SIZES.B * SIZES.NH))


@pytest.mark.slow
def test_a_gradient_is_tuned_on_its_own_and_stays_right(file: Path) -> None:
    args = [t.requires_grad_() for t in draw(SIZES, state=False)]

    def gradients() -> list[torch.Tensor]:
        return list(torch.autograd.grad(mlstm_chunkwise(*args)[0].square().sum(), args))

    expected = [t.double() for t in gradients()]
    with config.use(tune="online"):
        for _ in range(30):
            found = gradients()
    assert error(found, expected) <= 2 * GRADIENT_TOLERANCE[torch.float32]
    assert [key.split(" | ")[2] for key in tuned_plans.read(file)] == ["use=training"]


def test_a_plan_that_raises_is_replaced_by_the_default(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = draw(SIZES, state=False)
    real = learner.Learner._timed

    def broken(self: learner.Learner, way: learner.Way, call: object, arm: int, *more: object) -> object:
        if arm:
            raise RuntimeError("out of memory")
        return real(self, way, call, arm, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(learner.Learner, "_timed", broken)
    expected, _ = mlstm_chunkwise(*args)
    with config.use(tune="online"), trace.record() as recording:
        for _ in range(8):
            assert torch.equal(mlstm_chunkwise(*args)[0], expected)
    assert any("heads_per_band 1 failed" in (span.details or "") for span in recording.entries())


def test_threads_share_what_is_learned(file: Path) -> None:
    args = draw(SIZES, state=False)
    expected, _ = mlstm_chunkwise(*args)
    wrong: list[object] = []

    def work() -> None:
        with config.use(tune="online"):
            for _ in range(15):
                h, _ = mlstm_chunkwise(*args)
                wrong.extend([h] if error([h], [expected.double()]) > 2 * TOLERANCE[h.dtype] else [])

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong
    assert len(learner._learners) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="os.fork is not there")
def test_a_forked_child_learns_anew(file: Path) -> None:
    before = learner.generation()
    held = learner.learner(Config(tune=Tune.ONLINE), Config(), learner.Use(plan.Shape(2, 40, 8, 8), CPU, torch.float32,
                                                                           training=False, gradient=False))
    with held.controller._lock:
        child = os.fork()
        if not child:
            free = not held.controller._lock.locked() and not learner._learners and learner.generation() > before
            os._exit(0 if free else 1)
        assert os.waitpid(child, 0)[1] == 0


def test_a_file_that_another_process_writes_is_tried_again_later(file: Path) -> None:
    file.parent.mkdir()
    with files.locked(file.with_name(f".{file.name}.lock")):
        assert not keep.keep("on", {"a": None})
    assert keep.keep("on", {"a": None})
    assert json.loads(file.read_text())["winners"] == {}
    with pytest.warns(RuntimeWarning, match="is not kept for later processes"):
        assert keep.keep(str(file.parent / "tuned.json" / "x.json"), {"a": None})


def test_off_changes_nothing() -> None:
    forget()
    mlstm_chunkwise(*draw(SIZES, state=False))
    assert not learner._learners


def test_a_replay_is_the_same_each_time() -> None:
    scenario = scenarios(300, random.Random(0))[0]
    first, second = (benchmark.replay(scenario, Tune.THOMPSON, seed=3) for _ in range(2))
    assert first == second
    assert benchmark.fixed(scenario, "hindsight", 0) < benchmark.fixed(scenario, "default", 0)


@pytest.mark.slow
def test_the_live_benchmark_tells_of_every_policy() -> None:
    found = online_live.run(0.2, [Tune.BOLTZMANN])
    assert [row["scenario"] for row in found["rows"]] == [
        "quiet", "another process from half-way on", "lengths from 512 to 32K"]
    assert all(set(row["us_a_token"]) == {"off", "boltzmann"} for row in found["rows"])


@pytest.mark.slow
def test_the_overhead_is_told_of_every_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(online_overhead, "CALLS", 60)
    monkeypatch.setattr(online_overhead, "SETTLING", 100)
    found = online_overhead.run(3, SIZES.S)
    assert list(found["us_a_call"]) == ["off", "trying", "settled"]
    assert found["added_us"]["trying"] == round(found["us_a_call"]["trying"] - found["us_a_call"]["off"], 2)
    assert set(found["trials"]) == {"trying", "settled"}
