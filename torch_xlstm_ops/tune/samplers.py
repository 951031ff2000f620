"""In which order plans are tried: optuna's own samplers, and a bandit and a Boltzmann sampler beside them."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import optuna
from optuna.trial import FrozenTrial, TrialState

METHODS = ("random", "ga", "tpe", "bandit", "boltzmann", "grid")

EXPLORATION = 0.7  # standard deviations of the reward that a value tried once may be better than it looks
HOT, COLD = 1.0, 0.05  # Boltzmann's temperature at first and at last, in standard deviations of the reward
DISAGREEMENT = 0.4  # what a trial that chose another value for a setting already chosen still counts


def make(method: str, *, trials: int, seed: int) -> optuna.samplers.BaseSampler:
    """Return the sampler of a method; for `grid`, whose order the study gives, one that is not asked.

    trials: how many there will be. seed: of its draws.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return _MAKERS[method](trials, seed)


class Value(NamedTuple):
    """What is known of one value of a setting."""

    mean: float  # reward, in standard deviations above the mean of all
    trials: float  # how many, each as much as it agrees with what is already chosen


class _Discrete(optuna.samplers.BaseSampler):  # type: ignore[misc]
    """Chooses setting by setting, each by the rewards of its values beside what is already chosen."""

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
        values = known(finished, trial.params, name, distribution.choices)
        untried = [choice for choice in distribution.choices if choice not in values]
        if untried:
            return self._random.choice(untried)
        return self._choose(values, len(finished))

    def _choose(self, values: Mapping[Any, Value], finished: int) -> Any:
        raise NotImplementedError


class Bandit(_Discrete):
    """Takes the value with the highest upper confidence bound (UCB1)."""

    def _choose(self, values: Mapping[Any, Value], finished: int) -> Any:
        def bound(found: Value) -> float:
            return found.mean + EXPLORATION * math.sqrt(math.log(finished + 1) / found.trials)

        return max(values, key=lambda choice: bound(values[choice]))


class Boltzmann(_Discrete):
    """Draws a value with probability exp(mean / temperature), which falls as the trials go by."""

    def __init__(self, seed: int, trials: int) -> None:
        super().__init__(seed)
        self._trials = trials

    def temperature(self, finished: int) -> float:
        """Return the temperature after some trials: geometric from HOT to COLD."""
        return HOT * math.pow(COLD / HOT, min(finished / max(self._trials, 1), 1.0))

    def _choose(self, values: Mapping[Any, Value], finished: int) -> Any:
        best, T = max(value.mean for value in values.values()), self.temperature(finished)
        weights = [math.exp((value.mean - best) / T) for value in values.values()]
        return self._random.choices(list(values), weights)[0]


def known(
    finished: Sequence[FrozenTrial], chosen: Mapping[str, Any], name: str, choices: Sequence[Any]
) -> dict[Any, Value]:
    """Return what finished trials tell of the values of a setting, given what is chosen for others."""
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
    return {choice: Value(total / count, count) for choice, (total, count) in sums.items() if count}


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
