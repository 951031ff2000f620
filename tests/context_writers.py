"""Processes that write into one folder of states at once, and die at it; run as a script by test_context_disk.

    python -m tests.context_writers kill FOLDER COUNT SEED
    python -m tests.context_writers hammer FOLDER COUNT SEED

One process imports torch and forks the others, which costs a millisecond each.
"""

from __future__ import annotations

import functools
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from torch_xlstm_ops.context import codec, state_file
from torch_xlstm_ops.context.pool.disk import DiskTier
from torch_xlstm_ops.context.states import Snapshot
from torch_xlstm_ops.context.tokens import as_array, digest
from torch_xlstm_ops.maths.shapes import MLSTMState

IDENTITY = "f" * 32
KEYS = 16
SIDE = 256  # of c: a file of 1 MB, which takes long enough to be killed in the middle of
FITTING = 8  # states in the budget


def tokens_of(key: int) -> list[int]:
    return [key] * (key + 1)


@functools.cache
def packed(key: int) -> codec.EncodedSnapshot:
    """Return a state that can be told from every other key's."""
    layers = tuple(
        MLSTMState(torch.full((1, 2, SIDE, SIDE), key + 0.5), torch.full((1, 2, SIDE), float(key)), torch.ones(1, 2, 1))
        for _ in range(2)
    )
    tokens = as_array(tokens_of(key))
    return codec.encode(Snapshot(IDENTITY, len(tokens), digest(tokens), None, layers, torch.full((8,), float(key))))


@functools.cache
def disk(folder: Path) -> DiskTier:
    return DiskTier(folder, FITTING * (len(state_file.to_bytes(packed(0))) + 64))


def write(folder: Path, seed: int, count: int) -> None:
    """Put and get so many times; raises where a state is wrong."""
    draw, pool = random.Random(seed), disk(folder)
    for _ in range(count):
        key = draw.randrange(KEYS)
        if draw.random() < 0.8:
            assert pool.put(packed(key))
        for name in pool.matching(IDENTITY, as_array(tokens_of(key))):
            found = pool.get(name)
            assert found is None or found.tensors["0.c"].unique().tolist() == [key + 0.5]


def check(folder: Path) -> int:
    """Return the number of states, all of them whole and together within the budget."""
    pool = disk(folder)
    with pool.lock():  # between two puts
        entries = pool.entries()
        assert sum(entry.size for entry in entries) <= pool.budget
    assert all(wrong is None for _, wrong in pool.verify())
    return len(entries)


def fork(folder: Path, seed: int, count: int) -> int:
    """Return a process that has begun to write."""
    begun, beginning = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(300)  # whatever becomes of the parent
        os.write(beginning, b"!")
        try:
            write(folder, seed, count)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    os.close(beginning)
    os.read(begun, 1)
    os.close(begun)
    return child


def kill(folder: Path, count: int, draw: random.Random) -> None:
    left = 0
    for number in range(count):
        child = fork(folder, number, 1 << 30)
        time.sleep(draw.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL, "the writer ended before"
        left += len(list(folder.glob("*/.*.partial")))
        check(folder)
        assert disk(folder).put(packed(number % KEYS))
        assert disk(folder).prune(disk(folder).budget or 0) == []
        assert not list(folder.glob("*/.*.partial"))
        assert check(folder) > 0
    print(f"{count} killed, {left} of them in the middle of a file")


def hammer(folder: Path, count: int, draw: random.Random) -> None:
    left = {fork(folder, draw.randrange(1 << 30), 30) for _ in range(count)}
    while left:
        check_size(folder)
        for child in list(left):
            ended, status = os.waitpid(child, os.WNOHANG)
            assert status == 0
            left -= {ended}
    assert check(folder) == FITTING
    print(f"{count} at once")


def check_size(folder: Path) -> None:
    """Hold the budget to what lies there between two puts, whatever it is."""
    pool = disk(folder)
    with pool.lock():
        assert sum(file.stat().st_size for file in folder.glob("*/*")) <= pool.budget


if __name__ == "__main__":
    torch.set_num_threads(1)
    _, what, where, number, seed = sys.argv
    for key in range(KEYS):
        packed(key)  # made before the forks, which are to spend their time on writing
    {"kill": kill, "hammer": hammer}[what](Path(where), int(number), random.Random(int(seed)))
