"""Laws of tuned plans: `auto` runs them, an invalid one is skipped with a warning, and no writer loses an entry."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.oracle import Sizes, draw
from torch_xlstm_ops import config, trace
from torch_xlstm_ops.api import mlstm_chunkwise
from torch_xlstm_ops.config import tuned_plans
from torch_xlstm_ops.ops.mlstm import dispatch

SIZES = Sizes(S=40)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Keep tuned plans in a file of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config.reload(flags={})
    tuned_plans.forget()
    dispatch.forget()
    yield tmp_path / "torch_xlstm_ops" / "tuned.json"
    tuned_plans.forget()
    dispatch.forget()


def key(*, training: bool = False, **changed: Any) -> str:
    B, NH, S, DHQK, DHHV = SIZES
    kind = tuned_plans.call_kind(CPU, torch.float32, B * NH, S, DHQK, DHHV, training=training)
    return str(kind._replace(**changed))


def entry(**settings: object) -> dict[str, object]:
    return {"settings": {"schedule": "queued", "chunk_size": 16, "segment": 16, "workers": 1, **settings}}


def ran(*, training: bool = False, **how: Any) -> list[tuple[str, str | None, int | None]]:
    """Return phase, schedule and segment of the tasks of a call."""
    args = draw(SIZES, state=False)
    with trace.record() as recording:
        h, _ = mlstm_chunkwise(*[t.requires_grad_(training) for t in args], **how)
        if training:
            h.sum().backward()
    return [(e.phase, e.schedule, e.segment) for e in recording.entries()]


def test_auto_runs_the_tuned_plan_and_only_auto(file: Path) -> None:
    assert {schedule for _, schedule, _ in ran()} == {"inductor"}
    tuned_plans.store(file, {key(): entry()})
    dispatch.forget()
    assert {(schedule, number) for _, schedule, number in ran()} == {("queued", 0), ("queued", 1), ("queued", 2)}
    assert {schedule for _, schedule, _ in ran(schedule="inductor")} == {"inductor"}
    with config.use(tuned="off"):
        assert {schedule for _, schedule, _ in ran()} == {"inductor"}


def test_what_the_user_set_is_kept(file: Path) -> None:
    tuned_plans.store(file, {key(): entry()})
    with config.use(segment=32):
        assert {number for _, _, number in ran()} == {0, 1}


def test_training_and_prefill_have_plans_of_their_own(file: Path) -> None:
    tuned_plans.store(file, {key(training=True): entry(schedule="inductor")})
    assert {number for _, _, number in ran()} == {0}
    found = ran(training=True)
    assert {(phase, number) for phase, _, number in found if phase == "forward"} == {("forward", n) for n in range(3)}
    assert {number for phase, _, number in found if phase == "backward"} == {0, 1, 2}


@pytest.mark.parametrize("changed", [
    {"device": "another"}, {"torch": "2.0"}, {"tokens": 128}, {"DHHV": 32}, {"dtype": "bfloat16"},
])
def test_a_plan_of_another_kind_is_not_used(file: Path, changed: dict[str, Any]) -> None:
    tuned_plans.store(file, {key(**changed): entry()})
    assert {schedule for _, schedule, _ in ran()} == {"inductor"}


@pytest.mark.parametrize("text", ["", "no JSON", "[]", '{"version": 99, "winners": {}}', '{"version": 1}'])
def test_a_corrupt_file_is_not_used_and_a_warning_says_so(file: Path, text: str) -> None:
    file.parent.mkdir()
    file.write_text(text)
    with pytest.warns(RuntimeWarning, match="tuned plans are not used"):
        assert {schedule for _, schedule, _ in ran()} == {"inductor"}


@pytest.mark.parametrize(("write", "wrong"), [
    (lambda path: path.write_text("[" * 100_000), "deeper than 32 levels"),
    (lambda path: path.write_bytes(b"") or os.truncate(path, 1 << 43), "8796093022208 bytes, more than"),
    (lambda path: os.mkfifo(path), "not a regular file"),
    (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
], ids=["deep", "8 TiB", "FIFO", "device"])
@pytest.mark.skipif(os.name != "posix", reason="FIFOs need POSIX")
def test_only_a_small_shallow_regular_file_is_read_and_another_is_kept(
    file: Path, write: Callable[[Path], object], wrong: str
) -> None:
    file.parent.mkdir()
    write(file)
    before = os.stat(file)
    with pytest.warns(RuntimeWarning, match=f"tuned plans are not used, .*{wrong}"):
        assert {schedule for _, schedule, _ in ran()} == {"inductor"}
    with pytest.raises(ValueError, match=wrong):
        tuned_plans.store(file, {"a": entry()})
    assert os.path.samestat(os.stat(file), before)


@pytest.mark.parametrize("broken", [
    None, {}, {"settings": {}}, {"settings": {"schedule": "fast"}}, {"settings": {"schedule": "auto"}},
    entry(workers=0), entry(speed=1),
])
def test_a_corrupt_entry_is_skipped_with_a_warning_and_the_others_stay(file: Path, broken: Any) -> None:
    file.parent.mkdir()
    file.write_text(json.dumps({"version": 1, "winners": {"broken": broken, key(): entry()}}))
    with pytest.warns(RuntimeWarning, match="a tuned plan is not used, .*broken"):
        assert {schedule for _, schedule, _ in ran()} == {"queued"}


def test_a_plan_whose_schedule_cannot_run_is_not_used(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_xlstm_ops import schedules

    tuned_plans.store(file, {key(): entry()})
    real = schedules.unavailable
    monkeypatch.setattr(schedules, "unavailable",
                        lambda s, device: "gone" if s is config.Schedule.QUEUED else real(s, device))
    with pytest.warns(RuntimeWarning, match=r"queued cannot run here \(gone\)"):
        assert {schedule for _, schedule, _ in ran()} == {"inductor"}


def test_storing_keeps_other_entries_replaces_a_broken_file_and_removes_entries(file: Path) -> None:
    tuned_plans.store(file, {"a": entry(), "b": entry()})
    tuned_plans.store(file, {"b": None, "c": entry()})
    assert list(tuned_plans.read(file)) == ["a", "c"]
    file.write_text("broken")
    tuned_plans.store(file, {"d": entry()}, replace_damaged=True)
    assert list(tuned_plans.read(file)) == ["d"]
    assert [path.name for path in file.parent.iterdir()] == ["tuned.json"]


@pytest.mark.parametrize(("text", "replaces"), [
    ('{"name": "a package"}', False), ("plain text", False), ('{"version": 2, "winners": {}}', True),
])
def test_storing_never_replaces_another_file_or_a_newer_version(tmp_path: Path, text: str, replaces: bool) -> None:
    other = tmp_path / "package.json"
    other.write_text(text)
    with pytest.raises(ValueError, match=r"package\.json must be"):
        tuned_plans.store(other, {"a": entry()}, replace_damaged=replaces)
    assert other.read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["package.json"]


def test_storing_through_a_link_keeps_the_link(tmp_path: Path, file: Path) -> None:
    real = tmp_path / "elsewhere.json"
    file.parent.mkdir()
    file.symlink_to(real)
    tuned_plans.store(file, {"a": entry()})
    assert file.is_symlink()
    assert list(tuned_plans.read(real)) == ["a"]


WRITER = """
import sys, threading
from pathlib import Path
from torch_xlstm_ops.config import tuned_plans

def write(thread):
    for number in range(15):
        tuned_plans.store(Path(sys.argv[1]), {f"{sys.argv[2]} {thread} {number}": {"settings": {"schedule": "queued"}}})

threads = [threading.Thread(target=write, args=(number,)) for number in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def test_five_writers_of_thirty_entries_lose_none(file: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", WRITER, str(file)]
    writers = [subprocess.Popen([*command, str(number)], stderr=subprocess.PIPE, text=True) for number in range(5)]
    for writer in writers:
        _, errors = writer.communicate(timeout=300)
        assert (writer.returncode, errors) == (0, "")
    assert len(tuned_plans.read(file)) == 150
    assert [path.name for path in file.parent.iterdir()] == ["tuned.json"]


def test_the_setting_names_another_file_or_none(tmp_path: Path, file: Path) -> None:
    assert tuned_plans.place("on") == file
    assert tuned_plans.place("off") is None
    assert tuned_plans.place("there.json") == Path("there.json")


def test_importing_reads_no_file_and_a_call_reads_it_once(file: Path) -> None:
    tuned_plans.store(file, {key(): entry()})
    check = """
import os, sys
read = []
sys.addaudithook(lambda event, args: event == "open" and read.append(os.path.basename(str(args[0]))))
import torch
from torch_xlstm_ops import mlstm_chunkwise
assert "tuned.json" not in read
q = torch.randn(2, 3, 19, 8)
for _ in range(3):
    mlstm_chunkwise(q, q, torch.randn(2, 3, 19, 16), q[..., 0], q[..., 0], chunk_size=16)
assert read.count("tuned.json") == 1, read
"""
    subprocess.run([sys.executable, "-c", check], check=True, timeout=300)
