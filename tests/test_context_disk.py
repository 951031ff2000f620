"""Laws of the folder of states: whole or not there, within its budget, whoever writes, dies, or meddles."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.context_writers import FITTING, IDENTITY, disk, packed, tokens_of
from torch_xlstm_ops.context import state_file
from torch_xlstm_ops.context.pool.disk import DiskTier
from torch_xlstm_ops.context.tokens import as_array

pytest.importorskip("safetensors")
pytestmark = pytest.mark.skipif(os.name != "posix", reason="forking writers needs POSIX")


def writers(what: str, folder: Path, count: int) -> str:
    command = [sys.executable, "-W", "error", "-m", "tests.context_writers", what, str(folder), str(count), "0"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=Path(__file__).parent.parent,
                         env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize("count", [10, pytest.param(50, marks=pytest.mark.slow)])
def test_writers_killed_at_any_moment_leave_whole_states_and_the_next_starts_clean(tmp_path: Path, count: int) -> None:
    assert writers("kill", tmp_path, count).startswith(f"{count} killed")


@pytest.mark.parametrize("count", [3, pytest.param(8, marks=pytest.mark.slow)])
def test_many_processes_hold_the_budget_and_read_what_was_written(tmp_path: Path, count: int) -> None:
    assert writers("hammer", tmp_path, count) == f"{count} at once\n"


def held(pool: DiskTier) -> list[int]:
    """Return the keys that are there, the least recently used first."""
    return [entry.name.position - 1 for entry in pool.entries()]


def name_of(pool: DiskTier, key: int) -> object:
    return pool.matching(IDENTITY, as_array(tokens_of(key)))[0]


def aged(pool: DiskTier) -> None:
    """Set what is there back in time, in its order: the clock of files may be coarse."""
    for age, entry in enumerate(reversed(pool.entries()), 1):
        os.utime(entry.name.path, (entry.used - age, entry.used - age))


def test_the_least_recently_used_goes_first_and_pins_stay(tmp_path: Path) -> None:
    pool = disk(tmp_path)
    for key in range(FITTING):
        assert pool.put(packed(key), pin=key == 1)
        aged(pool)
    assert held(pool) == list(range(FITTING))
    assert pool.get(name_of(pool, 0)) is not None
    assert pool.put(packed(20))
    assert pool.put(packed(21))
    assert sorted(held(pool)) == [0, 1, *range(4, FITTING), 20, 21]
    assert pool.usage().pinned == 1
    name_of(pool, 1).set_pin(False)
    assert pool.prune(0)[0].name.position - 1 in (1, 4)
    assert held(pool) == []


def test_pins_that_fill_the_budget_are_told(tmp_path: Path) -> None:
    pool = disk(tmp_path)
    for key in range(FITTING):
        assert pool.put(packed(key), pin=True)
    with pytest.warns(RuntimeWarning, match="could not save a state to .*: its .* bytes and the pinned states"):
        assert not pool.put(packed(30))
    assert sorted(held(pool)) == list(range(FITTING))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.2, 0.5, 0.9, 0.999])
def test_a_flipped_byte_is_found_and_the_file_removed(tmp_path: Path, share: float) -> None:
    pool = disk(tmp_path)
    pool.put(packed(3), pin=True)
    name = name_of(pool, 3)
    content = bytearray(name.path.read_bytes())
    content[int(share * len(content))] ^= 0x10
    name.path.write_bytes(content)
    ((_, wrong),) = pool.verify()
    assert wrong is not None
    assert name.path.exists()
    with pytest.warns(RuntimeWarning, match="removed a damaged state, its tokens are read again"):
        assert pool.get(name) is None
    assert list(name.path.parent.iterdir()) == []
    assert pool.put(packed(3))
    assert pool.get(name) is not None


def test_every_byte_of_a_header_is_guarded(tmp_path: Path) -> None:
    content = state_file.to_bytes(packed(2))
    exact = state_file.read(_written(tmp_path, content))
    end = 8 + int.from_bytes(content[:8], "little")
    for at in range(0, end, 7):
        changed = bytearray(content)
        changed[at] ^= 0x01
        try:
            found = state_file.read(_written(tmp_path, bytes(changed)))
        except state_file.DamagedFile:
            continue
        assert found.about == exact.about  # a byte that means nothing, such as padding
        assert all(torch.equal(found.tensors[name], tensor) for name, tensor in exact.tensors.items())


def _written(folder: Path, content: bytes) -> Path:
    path = folder / "state"
    path.write_bytes(content)
    return path


def test_a_truncated_file_is_a_miss(tmp_path: Path) -> None:
    pool = disk(tmp_path)
    for keep in (0, 5, 100, 5000):
        pool.put(packed(3))
        name = name_of(pool, 3)
        os.truncate(name.path, keep)
        with pytest.warns(RuntimeWarning, match="removed a damaged state, its tokens are read again"):
            assert pool.get(name) is None


def test_a_file_under_anothers_name_is_refused(tmp_path: Path) -> None:
    pool = disk(tmp_path)
    pool.put(packed(3))
    pool.put(packed(4))
    os.replace(name_of(pool, 3).path, name_of(pool, 4).path)
    with pytest.warns(RuntimeWarning, match="does not hold the state that its name says"):
        assert pool.get(name_of(pool, 4)) is None
    stranger = tmp_path / ("0" * 32)
    stranger.mkdir()
    pool.put(packed(5))
    moved = stranger / name_of(pool, 5).path.name
    os.replace(name_of(pool, 5).path, moved)
    with pytest.warns(RuntimeWarning, match="does not hold the state that its name says"):
        assert pool.get(pool.names("0" * 32)[0]) is None


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    """The system itself refuses, by a limit on the size of files."""
    resource = pytest.importorskip("resource")
    pool, limits = disk(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.warns(RuntimeWarning, match="could not save a state to .*: File too large"):
            assert not pool.put(packed(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_folder_that_may_only_be_read_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = disk(tmp_path)
    pool.put(packed(3))

    def refuse(*args: object, **keywords: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "utime", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)
    assert pool.get(name_of(pool, 3)) is not None
    with pytest.warns(RuntimeWarning, match="could not save a state to .*: Read-only file system"):
        assert not pool.put(packed(4))


def test_a_lock_that_nobody_lets_go_of_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch_xlstm_ops.context.pool.disk.LOCK_TIMEOUT_SECONDS", 0.05)
    pool = disk(tmp_path)
    with pool.lock(), pytest.warns(RuntimeWarning, match="is still locked by another process"):
        assert not pool.put(packed(1))
    assert pool.put(packed(1))


def test_a_folder_that_is_not_there_is_empty(tmp_path: Path) -> None:
    pool = DiskTier(tmp_path / "none")
    assert pool.entries() == pool.matching(IDENTITY, as_array([1])) == list(pool.verify()) == []
