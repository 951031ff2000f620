"""The controller of one kind of call: decides which plan each call uses, within a budget of lost time."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from torch_xlstm_ops.maths.intervals import INTERVAL_ROUNDS, Interval, bounds, median
from torch_xlstm_ops.runtime import forks
from torch_xlstm_ops.schedules.online.budget import Budget
from torch_xlstm_ops.schedules.online.estimates import HALF_LIFE, Estimates, View
from torch_xlstm_ops.schedules.online.policy import Policy

MARGIN = 1.01  # times as fast as the best so far that a plan must be, with 95% confidence, to replace it
UNKNOWN_LOSS = 1.0  # of a call's time, assumed for a plan that was never tried
WINDOW = 24  # pairs of times that an interval is taken of
FAST, SLOW = 0.2, 0.01  # weight of a call in the present time of the best so far, and in the long run
CHANGED = 0.3  # logarithm of their ratio beyond which the machine has changed, where times do not vary much
SPIKE = 0.5  # most that one call counts, as the logarithm of its time over the usual one
WARM_UP = 2  # first calls of the plan in use that say nothing of it; of another plan, one
ASK_SECONDS = 1e-3  # of calls between two questions to the policy, which takes tens of microseconds
KEPT = 0.25  # weight that earlier observations then keep


_NOT_ASKED = "the best so far, less than a millisecond after the last decision"


class Arm(NamedTuple):
    """One plan that a controller may choose."""

    name: str
    compile_seconds: float = 0.0  # assumed for its first call; 0 if it uses the kernels of the default


class Decision(NamedTuple):
    """The plan of one call."""

    arm: int
    explores: bool
    reason: str


class Change(NamedTuple):
    """Another plan became the best so far."""

    leader: int
    before: int
    times_as_fast: Interval  # beside the one before
    reason: str


class Controller:
    """Decides for one kind of call; every method may be called from any thread. It reads no clock.

    arms: the plans; the first is the one that is used without tuning.
    budget: of lost time, shared with other controllers. seed: of the policy's draws.
    """

    def __init__(
        self, arms: Sequence[Arm], policy: Policy, budget: Budget, *, seed: int = 0, half_life: float = HALF_LIFE,
    ) -> None:
        self.arms, self.policy, self.leader = tuple(arms), policy, 0
        self._spent = 0.0  # seconds of this kind's calls
        self._budget, self._draws = budget, random.Random(seed)
        self._lock = forks.new_lock()
        self._estimates = Estimates(len(self.arms), half_life)
        self._pairs: list[deque[float]] = [deque(maxlen=WINDOW) for _ in self.arms]
        self._waiting: list[tuple[int, float, float | None]] = []  # trials until the best so far had its turn
        self._last: float | None = None  # seconds a token of the best so far, in its latest call
        self._present = self._long_run = 0.0  # logarithms of its seconds a token
        self._led = 0  # calls in them
        self._tokens = 0  # of the latest call
        self._varies = 0.0  # mean distance of the logarithm from the long run
        self._cold = [WARM_UP, *[1] * (len(self.arms) - 1)]  # calls that a plan needs to warm up
        self._failed: dict[int, str] = {}
        self._calls, self._asked = 0, -ASK_SECONDS
        self._owed, self._news = False, ""

    def decide(self) -> Decision:
        """Return the plan of the next call, and why."""
        with self._lock:
            self._calls += 1
            if self._spent - self._asked < ASK_SECONDS and not self._owed:
                return Decision(self.leader, False, _NOT_ASKED)
            self._asked = self._spent
            news, self._news = self._news, ""
            if self._owed or self._last is None:
                why = "its turn after a trial" if self._owed else "not timed yet"
                self._owed = False
                return Decision(self.leader, False, f"{news}the best so far, {why}")
            view = self._view(self._allowed())
            arm = self.policy.choose(view, self._draws)
            if arm == self.leader:
                return Decision(arm, False, f"{news}the best so far, {self.policy.name} tries none; {self._budget}")
            self._owed = True
            found = view.estimates[arm]
            known = f"{math.exp(found.mean):.3f} times in {found.trials:.1f} trials" if found.trials else "never tried"
            return Decision(arm, True, f"{news}a trial by {self.policy.name}: {known}; {self._budget}")

    def observe(self, arm: int, seconds: float, tokens: int, *, compiled: bool = False) -> Change | None:
        """Take the time of a call; return the change if its plan or another became the best so far.

        compiled: whether the call had to wait for a kernel: it counts as lost, and says nothing of the plan.
        """
        with self._lock:
            self._tokens = tokens
            cold = compiled or self._cold[arm] > 0
            if self._cold[arm] or compiled:
                self._cold[arm] = max(0, self._cold[arm] - 1)
                if self.arms[arm].compile_seconds:
                    self._budget.note_kernels(self.arms[arm].name, seconds if compiled else None)
            lost = max(0.0, seconds - self._expected(tokens)) if arm != self.leader else 0.0
            self._budget.add(0.0 if cold else seconds, lost)
            if cold:
                return None
            self._spent += seconds
            each = max(seconds, 1e-9) / max(tokens, 1)
            if arm != self.leader:
                self._waiting.append((arm, each, self._last))
                return None
            self._keep_pace(math.log(each))
            self._last = each
            waiting, self._waiting = self._waiting, []
            for trial in waiting:
                change = self._compare(*trial, after=each)
                if change is not None:
                    return change
            return None

    def fail(self, arm: int, seconds: float, reason: str) -> None:
        """Never try a plan again, since it raised an error."""
        with self._lock:
            self._failed[arm] = reason
            if arm == self.leader:
                self._lead(0)
            self._budget.add(0.0, seconds)
            self._owed = False
            self._news = f"{self.arms[arm].name} failed ({reason}) and is not tried again; "

    def speed(self, arm: int) -> float:
        """Return how many times as fast as the best so far a plan was."""
        with self._lock:
            return math.exp(self._estimates.mean(arm))

    def _allowed(self) -> list[int]:
        """Return the plans whose trial the budget admits, and the best so far."""
        call, found = self._expected(self._tokens), []
        for arm in range(len(self.arms)):
            if arm == self.leader:
                found.append(arm)
            elif arm not in self._failed:
                tried = self._estimates.count(arm, self._calls) > 0
                loss = math.exp(-self._estimates.mean(arm)) - 1 if tried else UNKNOWN_LOSS
                cold = self._budget.compile_seconds(self.arms[arm].name, self.arms[arm].compile_seconds)
                if self._budget.admits(max(0.0, loss) * call + cold):
                    found.append(arm)
        return found

    def _expected(self, tokens: int) -> float:
        """Return the seconds of a call of the best so far; 0 until one was timed."""
        return math.exp(self._present) * tokens if self._led else 0.0

    def _keep_pace(self, log: float) -> None:
        """Follow the time of the best so far, and let earlier observations count less where it has changed."""
        self._estimates.touch(self.leader, self._calls)
        if not self._led:
            self._present = self._long_run = log
        self._led += 1
        log = min(max(log, self._long_run - SPIKE), self._long_run + SPIKE)
        slow = max(SLOW, 1 / self._led)
        self._varies += slow * (abs(log - self._long_run) - self._varies)
        self._present += max(FAST, 1 / self._led) * (log - self._present)
        self._long_run += slow * (log - self._long_run)
        change = self._present - self._long_run
        if abs(change) > max(CHANGED, 1.5 * self._varies):
            self._estimates.forget(KEPT)
            self._forget_pairs()
            self._long_run, self._led = self._present, 1
            self._news = f"the machine has changed, a call takes {math.exp(change):.2f} times as long; "

    def _compare(self, arm: int, each: float, before: float | None, *, after: float) -> Change | None:
        """Compare a trial with the calls of the best so far around it; make the plan the best if it is faster."""
        if arm == self.leader:
            return None
        beside = after if before is None else math.sqrt(before * after)
        gain = math.log(beside / each)
        self.policy.observe(arm, gain, self._view((arm, self.leader)))
        self._estimates.add(arm, gain, self._calls)
        self._pairs[arm].append(beside / each)
        found = median(self._pairs[arm])
        if found.low <= MARGIN:
            return None
        pairs, former = len(self._pairs[arm]), self.leader
        assert pairs >= INTERVAL_ROUNDS
        reason = (f"{self.arms[arm].name} is {found.value:.3f} times (95%: {bounds(found.low, found.high)}) as fast as "
                  f"{self.arms[former].name} in {pairs} pairs, and is now the best so far; ")
        self._lead(arm)
        self._news = reason
        return Change(arm, former, found, reason)

    def _lead(self, arm: int) -> None:
        """Make a plan the best so far."""
        gain = self._estimates.mean(arm)
        self._estimates.lead(arm, self.leader, self._calls)
        self.policy.lead(arm, gain)
        self._forget_pairs()
        self.leader, self._last = arm, None
        self._present -= gain
        self._long_run -= gain

    def _forget_pairs(self) -> None:
        for pairs in self._pairs:
            pairs.clear()

    def _view(self, allowed: Sequence[int]) -> View:
        return self._estimates.view(self.leader, allowed, self._present - self._long_run, self._calls)
