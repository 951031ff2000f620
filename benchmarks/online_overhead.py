"""What the online controller adds to a call: microseconds a call without tuning, while it tries plans, and settled."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.timing import machine, spread
from torch_xlstm_ops import config, trace
from torch_xlstm_ops.api import mlstm_chunkwise
from torch_xlstm_ops.runtime import devices
from torch_xlstm_ops.schedules.online import learner
from torch_xlstm_ops.tune.workloads import Sizes, draw

HEADS = (1, 4, 64, 64)  # B, NH, DHQK, DHHV
CALLS, SETTLING = 400, 2000  # calls in a batch, and between the batches `trying` and `settled`
FIRST = 5  # calls of a new controller that are not timed: it is made, and its plans warm up


def run(rounds: int, tokens: int) -> dict[str, Any]:
    """Return the median of the batches of each state, their spread, and the share of calls that tried another plan.

    A round has one batch of each state. Before `trying` the controller forgets all. On the CPU calls run on one thread:
    other processes then disturb them less, and the controller's part is the same.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _run(rounds, tokens)
    finally:
        torch.set_num_threads(threads)


def _run(rounds: int, tokens: int) -> dict[str, Any]:
    device = devices.resolve_device("auto")
    B, NH, DHQK, DHHV = HEADS
    args = draw(Sizes(B, NH, tokens, DHQK, DHHV), torch.float32 if device.type == "cpu" else torch.bfloat16, device)

    def call() -> None:
        mlstm_chunkwise(*args)

    taken: dict[str, list[float]] = {}
    with torch.inference_mode():
        for number in range(rounds + 1):
            for state, us in _round(call, device).items():
                if number:  # the first round compiles
                    taken.setdefault(state, []).append(us)
        trials = _trials(call)
    median = {state: round(statistics.median(of), 2) for state, of in taken.items()}
    return {
        "machine": machine(device), "shape": {"B": B, "NH": NH, "S": tokens, "DHQK": DHQK, "DHHV": DHHV},
        "rounds": rounds, "calls": CALLS, "us_a_call": median,
        "spread": {state: spread(of) for state, of in taken.items()},
        "added_us": {state: round(median[state] - median["off"], 2) for state in median if state != "off"},
        "trials": trials,
    }


def _round(call: Callable[[], None], device: torch.device) -> dict[str, float]:
    """Return the microseconds a call of one batch of each state."""
    found = {}
    with config.use(tune="off", tuned="off"):
        found["off"] = _batch(call, device)
    with config.use(tune="online", tuned="off"):
        learner.forget()
        _repeat(call, FIRST)
        found["trying"] = _batch(call, device)
        _repeat(call, SETTLING)
        found["settled"] = _batch(call, device)
    return found


def _batch(call: Callable[[], None], device: torch.device) -> float:
    devices.synchronize(device)
    start = time.perf_counter()
    _repeat(call, CALLS)
    devices.synchronize(device)
    return (time.perf_counter() - start) * 1e6 / CALLS


def _repeat(call: Callable[[], None], times: int) -> None:
    for _ in range(times):
        call()


def _trials(call: Callable[[], None]) -> dict[str, float]:
    """Return the share of the calls in each batch of a round that tried another plan, from a trace."""
    shares = {}
    with config.use(tune="online", tuned="off"):
        learner.forget()
        _repeat(call, FIRST)
        for state, before in (("trying", 0), ("settled", SETTLING)):
            _repeat(call, before)
            with trace.record() as recording:
                _repeat(call, CALLS)
            told = [span.details or "" for span in recording.entries() if span.op == learner.OP]
            shares[state] = sum(": a trial by" in details or "; a trial by" in details for details in told) / CALLS
    return shares
