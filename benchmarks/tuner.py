"""How near the tuner's methods come to the best plan of all, in a fifth of the trials.

    python -m benchmarks.tuner --out tuner-figures            # two shapes on this CPU, about 6 minutes

Every plan of a shape is measured once beside the best so far (the method `grid`), and the fastest once more beside the
default. Each other method is then replayed on these measurements, with each seed. One is run live, and its result is
timed in turns with the best of all.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
import torch

from benchmarks.timing import machine, save
from torch_xlstm_ops.config import Schedule
from torch_xlstm_ops.maths.intervals import Interval
from torch_xlstm_ops.runtime import devices
from torch_xlstm_ops.schedules.machine import machine as machine_of
from torch_xlstm_ops.tune import bench, plots, samplers, space, study, workloads
from torch_xlstm_ops.tune.bench import Measured
from torch_xlstm_ops.tune.records import Record
from torch_xlstm_ops.tune.search import Goal, Result, Search
from torch_xlstm_ops.tune.space import Candidate, Key

CASES = ["1,4,64,64,2048", "2,8,64,64,512"]  # one set of compiled kernels
FINALISTS, MOST_FINALISTS = 8, 24  # measured again: the maximum of many noisy values is too high
PART = 5  # a search tries one plan of this many
REPLAYED = tuple(method for method in samplers.METHODS if method != "grid")


class Replay:
    """A bench that returns recorded measurements."""

    def __init__(self, rewards: dict[Key, float]) -> None:
        self._rewards = rewards

    def measure(self, challenger: Candidate, best: Candidate | None, seconds: float) -> Measured:
        """Return the recorded ratio; KeyError for a plan that failed."""
        ratio = 1.0 if best is None else self._rewards[challenger.key] / self._rewards[best.key]
        return Measured(Interval(ratio, ratio, ratio), (), 0.0, None)

    def trace(self, candidate: Candidate, path: Path) -> None:
        """Write nothing."""


def search(
    name: str, place: space.Space, measures: bench.Bench, method: str, seed: int, trials: int, *,
    seconds: float = 0.0, folder: Path | None = None,
) -> tuple[Search, Result]:
    """Run one search to its end."""
    store = optuna.storages.InMemoryStorage() if folder is None else study.open_store(folder / study.STORE)
    found = Search(f"{name}-{method}-seed{seed}", place, measures, store, method=method, seed=seed,
                         goal=Goal(trials, None, seconds), about={"torch": torch.__version__}, folder=folder)
    return found, found.run()


def case(
    text: str, seeds: int, live: str, seconds: float, device: torch.device, folder: Path, searched: Sequence[Schedule]
) -> dict[str, Any]:
    """Return the figures of one shape."""
    B, NH, DHQK, DHHV, S = map(int, text.split(","))
    sizes = workloads.Sizes(B, NH, S, DHQK, DHHV)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    limits = space.Limits(bench.held_bytes(device), space.call_bytes(sizes.shape, dtype.itemsize, training=False))
    place = space.Space(sizes.shape, device, machine_of(device), limits, searched)
    timed = bench.Timed(place, [workloads.prefill(sizes, dtype, device)])
    name, trials = f"prefill {text}", len(place.plans) // PART
    every, ended = search(name, place, timed, "grid", 0, len(place.plans), seconds=seconds, folder=folder)
    rewards = {key: record.reward for key, record in every.known.items() if record.reward is not None}
    finals: dict[Key, float] = {}
    for key in sorted(rewards, key=rewards.__getitem__, reverse=True)[:MOST_FINALISTS]:
        if len(finals) >= FINALISTS and rewards[key] < max(finals.values()):
            break
        finals[key] = timed.measure(place.plans[key], place.default, 4 * seconds).times_as_fast.value
    rewards |= finals
    best_key = max(finals, key=finals.__getitem__)
    print(f"{text}: {len(rewards)} plans, the best is {ended.times_as_fast.value:.3f} times the default", flush=True)
    replays: dict[str, Sequence[Record]] = {}
    parts: dict[str, list[float]] = {}
    for method in REPLAYED:
        for seed in range(seeds):
            tried, _ = search(name, place, Replay(rewards), method, seed, trials)
            replays[tried.name] = tried.records
            assert tried.best is not None
            parts.setdefault(method, []).append(round(rewards[tried.best.key] / rewards[best_key], 4))
        print(f"  {method:<10} {parts[method]} of the best in {trials} trials", flush=True)
    picture = plots.reward_by_trial(folder / f"replay-{text.replace(',', 'x')}.png", replays)
    _, found = search(name, place, timed, live, seeds, trials, seconds=seconds, folder=folder)
    beside = timed.measure(found.best, place.plans[best_key], 4 * seconds).times_as_fast
    print(f"  live {live}: {found.times_as_fast.value:.3f} times the default, {beside.value:.3f} times the best of all",
          flush=True)
    return {
        "case": text, "plans": len(place.plans), "refused": len(place.refused), "trials": trials,
        "best": dict(place.plans[best_key].params), "best_beside_default": ended.times_as_fast,
        "part_of_the_best": parts, "within_5_percent": {m: min(found) >= 0.95 for m, found in parts.items()},
        "median_part": {m: statistics.median(found) for m, found in parts.items()},
        "live": {"method": live, "beside_default": found.times_as_fast, "beside_the_best_of_all": beside,
                 "params": dict(found.best.params)},
        "picture": picture.name, "load_average": bench.load_average(),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder for the result, every trial, and the pictures")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps; default auto")
    parser.add_argument("--cases", nargs="+", metavar="B,NH,DHQK,DHHV,S", default=CASES)
    parser.add_argument("--seeds", type=int, default=3, help="of each method, default 3")
    parser.add_argument("--schedules", nargs="+", type=Schedule, metavar="NAME", default=space.SEARCHED,
                        help="to choose among, default inductor queued; on CUDA the queue has thousands of plans")
    parser.add_argument("--live", choices=REPLAYED, default="tpe", help="the method that is run live, default tpe")
    parser.add_argument("--trial-seconds", type=float, default=0.5, help="for timing one plan, default 0.5")
    given = parser.parse_args(arguments)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    given.out.mkdir(parents=True)
    device = devices.resolve_device(given.device)
    cases = [case(text, given.seeds, given.live, given.trial_seconds, device, given.out, given.schedules)
             for text in given.cases]
    save({"machine": machine(device, "optuna"), "cases": cases}, given.out / "tuner.json")


if __name__ == "__main__":
    main()
