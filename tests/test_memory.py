"""A prefill's memory: beyond inputs and outputs it does not grow with the sequence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.parameters import tail

# Runs alone in a process, so that the peak is its own. Sizes and chunks as in test_mlstm_ops.
CHILD = """
import json, sys, torch
from torch_xlstm_ops import config, mlstm_chunkwise

def resident(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":"))

def extra(S, schedule):
    streams = [torch.randn(1, 4, S, D) for D in (8, 8, 16)] + [torch.randn(1, 4, S) for _ in range(2)]
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts again
    before = resident("VmRSS")
    h, _ = mlstm_chunkwise(*streams, chunk_size=16, schedule=schedule)
    return resident("VmHWM") - before - h.nbytes

torch.set_num_threads(min(2, torch.get_num_threads()))
found = {}
with config.use(**json.loads(sys.argv[1])), torch.inference_mode():
    for schedule in ("inductor", "queued"):
        extra(4096, schedule)  # compiles
        found[schedule] = [extra(S, schedule) for S in (16_384, 131_072)]
print(json.dumps(found))
"""
NOISE = 6 << 20  # of the allocator; a copy of h would be 32 MB


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="a peak of memory needs Linux's /proc")
@pytest.mark.parametrize("plan", tail([{}, {"segment": 1024, "heads_per_band": 4}]), ids=["bands", "abreast"])
def test_memory_of_a_prefill_does_not_grow_with_the_sequence(plan):
    command = [sys.executable, "-c", CHILD, json.dumps(plan)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert run.returncode == 0, run.stderr
    for schedule, (short, long) in json.loads(run.stdout.splitlines()[-1]).items():
        assert long - max(short, 0) < NOISE, f"{schedule}: {short} bytes for 16,384 tokens, {long} for 131,072"
