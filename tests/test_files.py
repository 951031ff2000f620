"""Laws of replacing and locking files: all or nothing, no planted link is followed, one holder at a time."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from torch_xlstm_ops.runtime import files
from torch_xlstm_ops.runtime.files import locked, replacing


@pytest.mark.parametrize("durable", [False, True])
def test_a_replaced_file_has_the_new_content_and_nothing_else_is_left(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "file"
    for content in ("old\n", "new\r\n"):
        with replacing(path, durable=durable) as file:
            file.write(content)
    with replacing(tmp_path / "bytes", "wb", durable=durable) as file:
        file.write(b"\r\n")
    assert path.read_bytes() == b"new\r\n"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["bytes", "file"]


def test_a_block_that_raises_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(path) as file:
        file.write(f"new {1 / 0}")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_for_the_whole_file_is_kept(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    real, link = tmp_path / "folder" / "real", tmp_path / "link"
    real.write_text("old")
    link.symlink_to(Path("folder") / "real")
    with replacing(link) as file:
        file.write("new")
    assert link.is_symlink()
    assert real.read_text() == "new"


def test_a_link_planted_at_the_partial_name_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = tmp_path / "victim"
    victim.write_text("kept")
    monkeypatch.setattr(files.os, "urandom", lambda size: b"\1" * size)
    planted = tmp_path / f".file.{'01' * 8}{files.PARTIAL}"
    planted.symlink_to(victim)
    with pytest.raises(FileExistsError), replacing(tmp_path / "file"):
        raise AssertionError("the block must not run")
    assert victim.read_text() == "kept"
    assert planted.is_symlink()


def test_partial_names_are_random(tmp_path: Path) -> None:
    with replacing(tmp_path / "file"), replacing(tmp_path / "file"):
        assert len(list(tmp_path.glob(f".file.*{files.PARTIAL}"))) == 2


def test_one_thread_at_a_time_holds_a_lock(tmp_path: Path) -> None:
    lock, inside, most = tmp_path / "lock", [0], [0]

    def work() -> None:
        for _ in range(50):
            with locked(lock):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert most == [1]
    assert not lock.exists() or os.name != "posix"


HOLDER = """
import sys, time
from torch_xlstm_ops.runtime.files import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_lock_of_a_process_is_waited_for_and_released_when_it_is_killed(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(lock)], stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"held\n"
            told = r"is still locked by another process after 0\.05 s"
            with pytest.raises(TimeoutError, match=told), locked(lock, 0.05):
                raise AssertionError("two holders")
        finally:
            holder.kill()
    with locked(lock, 10):
        assert lock.exists()


@pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="the system cannot refuse links")
def test_a_link_planted_at_the_lock_is_refused(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="lock"), locked(tmp_path / "lock"):
        raise AssertionError("the block must not run")
    assert not (tmp_path / "victim").exists()
