"""The schedule that carries out each call by the plan that the controller of its kind chooses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor

from torch_xlstm_ops.config import Config
from torch_xlstm_ops.kernels.mlstm import Kernels, State
from torch_xlstm_ops.schedules.online import learner
from torch_xlstm_ops.schedules.online.learner import Use, Way
from torch_xlstm_ops.schedules.plan import Plan

_Result = TypeVar("_Result")


class TunedSchedule:
    """Stands in the place of a schedule's module, for calls of one shape; the plan it is given is that of no tuning.

    call: how a call is carried out without tuning. carry_out: how it is by other settings.
    """

    def __init__(self, call: Way, asked: Config, used: Config, use: Use, carry_out: Callable[[Config], Way]) -> None:
        self._asked, self._used, self._use, self._carry_out = asked, used, use, carry_out
        self._first, self._generation = call, -1
        self._tokens = use.shape.rows * use.shape.tokens

    def forward(
        self, plan: Plan, kernels: Kernels, streams: Sequence[Tensor], state: State | None
    ) -> tuple[Tensor, State]:
        """Return h and the final state, as the schedules do."""
        def call(way: Way) -> tuple[Tensor, State]:
            return way.schedule.forward(way.plan, way.kernels, streams, state)  # type: ignore[no-any-return]

        return self._run(call)

    def backward(
        self, plan: Plan, kernels: Kernels, streams: Sequence[Tensor], state: State, dh: Tensor, dstate: State
    ) -> tuple[list[Tensor], State]:
        """Return the gradients of the streams and of the initial state, as the schedules do."""
        def call(way: Way) -> tuple[list[Tensor], State]:
            return way.schedule.backward(way.plan, way.kernels, streams, state, dh, dstate)  # type: ignore[no-any-return]

        return self._run(call)

    def _run(self, call: Callable[[Way], _Result]) -> _Result:
        if self._generation != learner.generation():
            generation = learner.generation()
            self._learner = learner.learner(self._asked, self._used, self._use)
            self._ways: dict[int, Way] = {0: self._first}
            self._generation = generation
        return self._learner.run(self._way_of, call, self._tokens)

    def _way_of(self, arm: int) -> Way:
        """Return how to carry out a call by a candidate."""
        found = self._ways.get(arm)
        if found is None:
            settings = self._learner.candidates[arm].settings
            found = self._carry_out(dataclasses.replace(self._asked, **settings))  # type: ignore[arg-type]
            self._ways[arm] = found
        return found
