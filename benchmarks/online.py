"""The online controller: the time that each policy loses against the best plan in hindsight.

    python -m benchmarks.online            # replayed scenarios: simulated times from recorded tables
    python -m benchmarks.online --live 60  # this machine, for so many seconds a policy
    python -m benchmarks.online --overhead # this machine: microseconds that the controller adds to a call

A replay charges each call the time of its plan with noise, and each first call of a plan with other kernels a
compilation; the same seeds give the same result. The best plan in hindsight is that of each phase, without a
compilation: no policy can reach it. The offline winner is the best plan of each kind as the machine is first. Without
--json, a replay of the default size is written to benchmarks/results/replay.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import online_live, online_overhead
from benchmarks.online_scenarios import SPIKE, SPIKES, Scenario, best_plans, scenarios
from benchmarks.run import commit
from benchmarks.timing import save
from torch_xlstm_ops.config import Tune
from torch_xlstm_ops.schedules.online import policies
from torch_xlstm_ops.schedules.online.budget import PART, Budget
from torch_xlstm_ops.schedules.online.controller import Controller

FILE = Path(__file__).parent / "results/replay/online.json"
POLICIES = (Tune.UCB, Tune.THOMPSON, Tune.BOLTZMANN, Tune.CFC)
CALLS, SEEDS = 40_000, 3


def replay(scenario: Scenario, tune: Tune, seed: int, part: float = PART) -> tuple[float, float, int]:
    """Return the seconds of a scenario's calls, those that trials lost by the controller's own account, and changes."""
    draws = random.Random(seed)
    budget, learners = Budget(part), dict[int, Controller]()
    compiled: set[int] = set()  # kernels serve all lengths
    seconds, changes = 0.0, 0
    for phase in scenario.phases:
        if phase.kind not in learners:
            learners[phase.kind] = Controller(scenario.arms, policies.make(tune), budget, seed=seed)
        learner = learners[phase.kind]
        for _ in range(phase.calls):
            arm = learner.decide().arm
            compiles = scenario.arms[arm].compile_seconds > 0 and arm not in compiled
            took = phase.seconds[arm] * noise(draws, phase.noise)
            if compiles:
                compiled.add(arm)
                took += scenario.compile_seconds
            seconds += took
            changes += learner.observe(arm, took, 1, compiled=compiles) is not None
    return seconds, budget.lost, changes


def noise(draws: random.Random, deviation: float) -> float:
    """Return the factor of a call's time."""
    return math.exp(draws.gauss(0, deviation)) * (SPIKE if draws.random() < SPIKES else 1.0)


def fixed(scenario: Scenario, chosen: str, seed: int) -> float:
    """Return the seconds with a plan that is fixed for each phase: `default`, `offline` or `hindsight`."""
    draws, offline, seconds = random.Random(seed), best_plans(scenario), 0.0
    for phase in scenario.phases:
        arm = {"default": 0, "offline": offline[phase.kind],
               "hindsight": min(range(len(phase.seconds)), key=phase.seconds.__getitem__)}[chosen]
        for _ in range(phase.calls):
            seconds += phase.seconds[arm] * noise(draws, phase.noise)
    return seconds


def replays(calls: int, seeds: int) -> dict[str, Any]:
    """Return the time lost in each scenario by each policy, the default and the offline winner."""
    found: list[dict[str, Any]] = []
    for index, first in enumerate(scenarios(calls, random.Random(0))):
        lost: dict[str, list[float]] = {}
        own: dict[str, list[float]] = {}
        for seed in range(seeds):
            scenario = scenarios(calls, random.Random(seed))[index]
            best = fixed(scenario, "hindsight", seed)
            for name in ("default", "offline"):
                lost.setdefault(name, []).append(fixed(scenario, name, seed) / best - 1)
            for tune in POLICIES:
                seconds, trials, _ = replay(scenario, tune, seed)
                lost.setdefault(str(tune), []).append(seconds / best - 1)
                own.setdefault(str(tune), []).append(trials / seconds)
        row = {name: round(statistics.mean(parts), 4) for name, parts in lost.items()}
        print(first.name, " ".join(f"{name} {part:.1%}" for name, part in row.items()), flush=True)
        found.append({"scenario": first.name, "lost": row,
                      "trials": {name: round(max(parts), 4) for name, parts in own.items()}})
    means = {name: round(statistics.mean(row["lost"][name] for row in found), 4) for name in found[0]["lost"]}
    winner = min(map(str, POLICIES), key=means.__getitem__)
    print("mean", means, "winner", winner)
    return {**_when(), "calls": calls, "seeds": seeds, "budget": PART, "rows": found, "mean": means, "winner": winner}


def _when() -> dict[str, str]:
    return {"date": datetime.date.today().isoformat(), "commit": commit()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=CALLS, help=f"of a scenario, default {CALLS}")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"of each policy, default {SEEDS}")
    parser.add_argument("--live", type=float, metavar="SECONDS", help="run on this machine, so long for each policy")
    parser.add_argument("--overhead", action="store_true", help="time calls without tuning and with the controller")
    parser.add_argument("--rounds", type=int, default=20, help="batches of each state for --overhead, default 20")
    parser.add_argument("--tokens", type=int, default=64, help="of a call for --overhead, default 64")
    parser.add_argument("--json", type=Path, help="where to write the result")
    given = parser.parse_args(arguments)
    if given.live is not None:
        save(_when() | online_live.run(given.live, POLICIES), given.json)
        return
    if given.overhead:
        found = _when() | online_overhead.run(given.rounds, given.tokens)
        print(json.dumps(found, indent=1))
        save(found, given.json)
        return
    whole = (given.calls, given.seeds) == (CALLS, SEEDS)
    save(replays(given.calls, given.seeds), given.json or (FILE if whole else None))


if __name__ == "__main__":
    main()
