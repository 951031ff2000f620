"""The law of long use: mixed calls from several threads leave memory, threads, file descriptors and caches as they are.

XLSTM_TEST_SOAK_SECONDS says for how long; by default half a minute.
"""

from __future__ import annotations

import functools
import os
import random
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests import context_models, together
from tests.oracle import TOLERANCE, Sizes, assert_close, draw, exact, weigh
from torch_xlstm_ops import config, mlstm_chunkwise, mlstm_step
from torch_xlstm_ops.api import slstm_sequence
from torch_xlstm_ops.context import StatePool, prefill
from torch_xlstm_ops.ops.mlstm import dispatch
from torch_xlstm_ops.runtime import compiler, devices

SECONDS = float(os.environ.get("XLSTM_TEST_SOAK_SECONDS", "30"))
pytestmark = [pytest.mark.slow, pytest.mark.timeout(10 * SECONDS + 900),
              pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts file descriptors in /proc")]
L, CALLERS = 16, 3
MEMORY = 48 << 20  # by which memory may differ between two moments: buffers of calls that run, and the allocator's


class Held(NamedTuple):
    """What the process holds."""

    memory: int
    threads: int
    descriptors: int
    kernels: int
    calls: int


def held() -> Held:
    return Held(devices.memory(torch.device("cpu")).used, threading.active_count(), len(os.listdir("/proc/self/fd")),
                len(compiler._callables), len(dispatch._cache._entries))


def operators(choose: random.Random) -> None:
    """Call an operator, with a gradient or without, and compare it with the recurrence now and then."""
    schedule, S = choose.choice(["inductor", "queued", "recurrent", None]), choose.choice([1, 5, 16, 40, 70])
    args = [t.requires_grad_() for t in draw(Sizes(S=S), seed=choose.randrange(100))]
    with config.use(segment=choose.choice([L, 2 * L]), workers=2):
        h, state = mlstm_chunkwise(*args, chunk_size=L, schedule=schedule)
    if choose.random() < 0.5:
        torch.autograd.grad(weigh([h, *state]), args)
    if choose.random() < 0.02:
        assert_close([h.detach()], [exact([t.detach() for t in args])[0]], 100 * TOLERANCE[torch.float32])
    q, k, v, igate, fgate, *_ = [t.detach() for t in args]
    mlstm_step(q[:, :, 0], k[:, :, 0], v[:, :, 0], igate[:, :, :1], fgate[:, :, :1], *(t.detach() for t in state))
    slstm_sequence(torch.randn(2, choose.choice([1, 4]), 4, 2, 4), torch.randn(4, 2, 4, 4), torch.randn(4, 2, 4))


def prompts(model: Any, pool: StatePool, choose: random.Random) -> None:
    """Read a prompt with a pool that is smaller than all of them."""
    tokens = context_models.some_tokens(choose.choice([20, 40, 70]), choose.randrange(30))
    prefill(model, tokens, pool=pool, segment=context_models.SEGMENT)


def test_mixed_calls_hold_no_more_at_the_end_than_after_the_beginning(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from torch_xlstm_ops.patch import patch

    torch.set_num_threads(1)
    plain, patched = context_models.build(), context_models.build()
    pools = [StatePool(model, tmp_path / name, host_bytes=1 << 20, disk_bytes=4 << 20)
             for name, model in (("plain", plain), ("patched", patched))]
    counts = [0] * CALLERS

    def caller(number: int, until: float) -> None:
        choose = random.Random(number + counts[number])
        while time.monotonic() < until:
            operators(choose)
            if number == 0:  # a pool's model is used by one thread at a time
                prompts(plain, pools[0], choose)
                prompts(patched, pools[1], choose)
            counts[number] += 1

    def run(seconds: float) -> Held:
        until = time.monotonic() + seconds
        together.run([functools.partial(caller, number, until) for number in range(CALLERS)], seconds=seconds + 600)
        return held()

    with patch(patched):
        run(SECONDS / 4)  # compiles, and fills what is bounded
        first = run(SECONDS / 4)
        last = run(SECONDS / 2)
    assert min(counts) > 3
    assert last.memory - first.memory < MEMORY, (first, last, counts)
    assert last.threads <= first.threads, (first, last)
    assert last.descriptors <= first.descriptors, (first, last)
    assert (last.kernels, last.calls) <= (first.kernels + 8, first.calls + 16), (first, last)
