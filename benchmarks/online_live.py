"""Live scenarios of the online controller: a call is repeated for some seconds, with each policy and without tuning."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from benchmarks.timing import machine
from torch_xlstm_ops import config
from torch_xlstm_ops.api import mlstm_chunkwise
from torch_xlstm_ops.config import Tune
from torch_xlstm_ops.runtime import devices
from torch_xlstm_ops.schedules.online import learner
from torch_xlstm_ops.tune.workloads import Sizes, draw

HEADS = (1, 4, 64, 64)  # B, NH, DHQK, DHHV
_BUSY = "while True: pass"
_GPU_BUSY = "import torch; a = torch.randn(8192, 8192, device='cuda')\nwhile True: (a @ a).sum().item()"


def run(seconds: float, policies: Sequence[Tune]) -> dict[str, Any]:
    """Return microseconds a token in each scenario without tuning and with each policy.

    seconds: for each. A scenario runs for all policies one after another, on a machine that may change meanwhile.
    """
    device = devices.resolve_device("auto")
    scenarios: dict[str, tuple[list[int], bool]] = {
        "quiet": ([2048], False), "another process from half-way on": ([2048], True),
        "lengths from 512 to 32K": ([512 << power for power in range(7)], False),
    }
    found = []
    for name, (lengths, disturbed) in scenarios.items():
        rows = {}
        for tune in (Tune.OFF, *policies):
            learner.forget()
            with config.use(tune=tune, tuned="off"):
                rows[str(tune)] = round(_part(lengths, seconds, device, disturbed=disturbed), 4)
        print(name, rows, flush=True)
        found.append({"scenario": name, "us_a_token": rows})
    return {"machine": machine(device), "seconds": seconds, "rows": found}


def _part(lengths: Sequence[int], seconds: float, device: torch.device, *, disturbed: bool) -> float:
    """Return the microseconds a token of calls of each length, for an equal part of the time."""
    spent, tokens = 0.0, 0
    for length in lengths:
        B, NH, DHQK, DHHV = HEADS
        args = draw(Sizes(B, NH, length, DHQK, DHHV), torch.float32 if device.type == "cpu" else torch.bfloat16, device)
        with torch.inference_mode(), config.use(tune="off"):
            mlstm_chunkwise(*args)  # both compile
        for other in (False, disturbed):
            with _other_process(device) if other else contextlib.nullcontext():
                devices.synchronize(device)
                began = time.perf_counter()
                while time.perf_counter() - began < seconds / len(lengths) / 2:
                    with torch.inference_mode():
                        mlstm_chunkwise(*args)
                    tokens += B * length
                devices.synchronize(device)
                spent += time.perf_counter() - began
    return spent / tokens * 1e6


@contextlib.contextmanager
def _other_process(device: torch.device) -> Iterator[None]:
    """Have another process use a core, or the GPU, inside a ``with`` block."""
    code = _GPU_BUSY if device.type == "cuda" else _BUSY
    with subprocess.Popen([sys.executable, "-c", code]) as other:
        try:
            yield
        finally:
            other.kill()
