"""The samplers that propose plans: optuna's, a bandit, and a Boltzmann sampler."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import optuna
from optuna.trial import FrozenTrial, TrialState

METHODS = ("random", "ga", "tpe", "bandit", "boltzmann", "grid")

EXPLORATION = 0.7  # standard deviations of the reward that the bandit adds to a value tried once
HOT, COLD = 1.0, 0.05  # first and last temperature, in standard deviations of the reward
DISAGREEMENT = 0.4  # weight of a trial for each setting already chosen in which it has another value


def make(method: str, *, trials: int, seed: int) -> optuna.samplers.BaseSampler:
    """Return the sampler of a method; the one of `grid` is not used, since the search orders its plans.

    trials: planned number. seed: of the draws.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return _MAKERS[method](trials, seed)


class Estimate(NamedTuple):
    """The estimated reward of one value of a setting."""

    mean: float  # in standard deviations above the mean of all trials
    trials: float  # their number, weighted by agreement with the settings already chosen


class _Discrete(optuna.samplers.BaseSampler):  # type: ignore[misc]
    """Chooses one setting after another, by the estimated rewards of its values given those already chosen."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
        return {}

    def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
        return {}

    def reseed_rng(self) -> None:
        self._random = random.Random()

    def sample_independent(self, study: Any, trial: FrozenTrial, name: str, distribution: Any) -> Any:
        finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        values = estimates(finished, trial.params, name, distribution.choices)
        untried = [choice for choice in distribution.choices if choice not in values]
        if untried:
            return self._random.choice(untried)
        return self._choose(values, len(finished))

    def _choose(self, values: Mapping[Any, Estimate], finished: int) -> Any:
        raise NotImplementedError


class Bandit(_Discrete):
    """Chooses the value with the highest upper confidence bound (UCB1)."""

    def _choose(self, values: Mapping[Any, Estimate], finished: int) -> Any:
        def bound(found: Estimate) -> float:
            return found.mean + EXPLORATION * math.sqrt(math.log(finished + 1) / found.trials)

        return max(values, key=lambda choice: bound(values[choice]))


class Boltzmann(_Discrete):
    """Draws a value with probability proportional to exp(mean / temperature); the temperature falls with the trials."""

    def __init__(self, seed: int, trials: int) -> None:
        super().__init__(seed)
        self._trials = trials

    def temperature(self, finished: int) -> float:
        """Return the temperature after some trials: geometric from HOT to COLD."""
        return HOT * math.pow(COLD / HOT, min(finished / max(self._trials, 1), 1.0))

    def _choose(self, values: Mapping[Any, Estimate], finished: int) -> Any:
        best, T = max(value.mean for value in values.values()), self.temperature(finished)
        weights = [math.exp((value.mean - best) / T) for value in values.values()]
        return self._random.choices(list(values), weights)[0]


def estimates(
    finished: Sequence[FrozenTrial], chosen: Mapping[str, Any], name: str, choices: Sequence[Any]
) -> dict[Any, Estimate]:
    """Estimate the rewards of a setting's values from finished trials, given the settings already chosen."""
    logs = [math.log(trial.value) for trial in finished if trial.value]
    if not logs:
        return {}
    mean = sum(logs) / len(logs)
    deviation = math.sqrt(sum((log - mean) ** 2 for log in logs) / len(logs)) or 1.0
    sums = {choice: [0.0, 0.0] for choice in choices}
    for trial in finished:
        if trial.value and trial.params.get(name) in sums:
            weight = DISAGREEMENT ** sum(trial.params.get(field) != value for field, value in chosen.items())
            sums[trial.params[name]][0] += weight * (math.log(trial.value) - mean) / deviation
            sums[trial.params[name]][1] += weight
    return {choice: Estimate(total / count, count) for choice, (total, count) in sums.items() if count}


def _random(trials: int, seed: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.RandomSampler(seed=seed)


def _genetic(trials: int, seed: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.NSGAIISampler(population_size=max(6, trials // 5), seed=seed)


def _tpe(trials: int, seed: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.TPESampler(n_startup_trials=max(5, trials // 4), multivariate=True, seed=seed)


_MAKERS: dict[str, Callable[[int, int], optuna.samplers.BaseSampler]] = {
    "random": _random, "ga": _genetic, "tpe": _tpe, "bandit": lambda trials, seed: Bandit(seed),
    "boltzmann": lambda trials, seed: Boltzmann(seed, trials), "grid": _random,
}
