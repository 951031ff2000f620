"""Laws of tracing: nothing when off, every span when on, device time from the device, files replaced atomically."""

from __future__ import annotations

import csv
import itertools
import json
import os
import subprocess
import sys
import threading
import time
import timeit
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from expecttest import assert_expected_inline

from torch_xlstm_ops import config, trace
from torch_xlstm_ops.runtime import devices, files
from torch_xlstm_ops.trace.export import Span
from torch_xlstm_ops.trace.recording import PENDING

CPU = torch.device("cpu")
LATE = torch.device("meta:0")  # stands for a device that finishes work after the call returns


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("XLSTM_OPS_TRACE", raising=False)
    config.reload(flags={})
    yield
    monkeypatch.undo()
    config.reload(flags={})
    assert not trace.active()


class LateDevice:
    """A device whose events are not finished before `finish`."""

    def __init__(self) -> None:
        self.now = 0.0  # milliseconds, set by the test when it submits work
        self.passed = 0.0

    def event(self, device: torch.device, *, timing: bool = False) -> devices.Event:
        assert timing
        return LateEvent(self)


class LateEvent:
    def __init__(self, device: LateDevice) -> None:
        self.device, self.at = device, -1.0

    def record(self) -> None:
        self.at = self.device.now

    def query(self) -> bool:
        return self.at <= self.device.passed

    def synchronize(self) -> None:
        self.device.passed = max(self.device.passed, self.at)

    def elapsed_time(self, end: devices.Event, /) -> float:
        assert isinstance(end, LateEvent)
        assert self.query()
        assert end.query()
        return end.at - self.at


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> LateDevice:
    device = LateDevice()
    monkeypatch.setattr(devices, "event", device.event)
    monkeypatch.setattr(devices, "has_events", lambda device: device == LATE)
    return device


def test_off_is_one_branch_and_a_span_that_does_nothing() -> None:
    assert not trace.active()
    with trace.span("op") as nothing:
        nothing.note("nobody records this")
    assert trace.span("op") is trace.span("other", band=1)
    assert min(timeit.repeat(trace.active, number=10_000, repeat=5)) / 10_000 < 0.5e-6


def test_a_span_says_what_ran_where_and_how_long() -> None:
    trace.set_layer(3)
    with trace.record() as recording:
        assert trace.active()
        with trace.span("mlstm", schedule="queued", phase="backward", band=1, segment=2, nbytes=64, queue_depth=5):
            time.sleep(0.01)
    trace.set_layer(None)
    (entry,) = recording.entries()
    assert 10_000 <= entry.duration_us < 1e6
    assert 0 <= entry.start_us < 1e6
    expected = Span("mlstm", "queued", "backward", 3, 1, 2, "cpu", threading.current_thread().name, 0.0, 0.0, 64, 5)
    assert entry._replace(start_us=0.0, duration_us=0.0) == expected


def test_work_that_raises_leaves_no_span() -> None:
    with trace.record() as recording, pytest.raises(KeyError), trace.span("op"):
        raise KeyError
    assert recording.entries() == []


def test_a_recording_inside_another_adds_to_both() -> None:
    with trace.record() as outer:
        with trace.span("before"):
            pass
        with trace.record() as inner, trace.span("inside"):
            pass
        with trace.span("after"):
            pass
    assert [entry.op for entry in inner.entries()] == ["inside"]
    assert [entry.op for entry in outer.entries()] == ["before", "inside", "after"]


def test_work_while_paused_is_in_no_outer_recording() -> None:
    with trace.record() as outer:
        with trace.paused():
            assert not trace.active()
            with trace.record() as inner, trace.span("warm-up"):
                pass
        with trace.span("work"):
            pass
    assert [entry.op for entry in inner.entries()] == ["warm-up"]
    assert [entry.op for entry in outer.entries()] == ["work"]


def test_every_thread_adds_under_its_name() -> None:
    def work() -> None:
        for segment in range(500):
            with trace.span("op", segment=segment):
                pass

    with trace.record() as recording:
        threads = [threading.Thread(target=work, name=f"worker-{i}") for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    found = {(entry.thread, entry.segment) for entry in recording.entries()}
    assert found == {(f"worker-{i}", segment) for i in range(4) for segment in range(500)}


def test_memory_is_bounded_by_dropping_the_oldest() -> None:
    with trace.record(capacity=10) as recording:
        for segment in range(25):
            with trace.span("op", segment=segment):
                pass
    assert [entry.segment for entry in recording.entries()] == list(range(15, 25))
    assert recording.dropped == 15
    assert recording.summary().endswith("15 older entries were dropped")


def test_device_spans_use_the_devices_clock_and_do_not_wait(late: LateDevice) -> None:
    with trace.record() as recording:
        for segment in range(3):
            with trace.span("op", segment=segment, device=LATE):
                late.now += 5.0
        assert late.passed == 0.0  # nothing waited for it
    entries = recording.entries()
    assert [entry.duration_us for entry in entries] == [5000.0] * 3
    gaps = [b.start_us - a.start_us for a, b in itertools.pairwise(entries)]
    assert gaps == pytest.approx([5000.0] * 2)


def test_unread_device_spans_are_bounded(late: LateDevice) -> None:
    with trace.record() as recording:
        for _ in range(5000):
            with trace.span("op", device=LATE):
                late.now += 1.0
            assert len(recording._pending) <= PENDING
        assert late.passed > 0.0
    assert len(recording.entries()) == 5000
    assert recording.entries()[-1].start_us - recording.entries()[0].start_us == pytest.approx(4999e3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_spans_cover_the_work_not_the_launch() -> None:
    device = torch.device("cuda")
    a = torch.randn(8192, 8192, device=device)
    (a @ a).sum().item()
    with trace.record() as recording:
        began = time.perf_counter()
        with trace.span("matmul", device=device):
            for _ in range(20):
                a @ a
        launched = time.perf_counter() - began
        torch.cuda.synchronize()
        finished = time.perf_counter() - began
    (entry,) = recording.entries()
    assert launched < entry.duration_us / 1e6 <= finished
    assert entry.device == "cuda:0"


def _two_entries() -> trace.Recording:
    recording = trace.Recording()
    recording.add(Span("mlstm", "inductor", "forward", 0, 0, 1, "cpu", "main", 10.0, 500.0, 1000, 2))
    recording.add(Span("model", None, "prefill", None, None, None, "cuda:0", "main", 0.0, 1500.0, None, None))
    return recording


def test_csv_and_json_lines_hold_every_field(tmp_path: Path) -> None:
    recording = _two_entries()
    for name in ("a.csv", "a.jsonl"):
        recording.write(str(tmp_path / name))
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [Span(**line) for line in lines] == recording.entries()
    with open(tmp_path / "a.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [{k: "" if v is None else str(v) for k, v in line.items()} for line in lines]
    assert sorted(os.listdir(tmp_path)) == ["a.csv", "a.jsonl"]


def test_chrome_trace_has_the_fields_that_perfetto_reads(tmp_path: Path) -> None:
    _two_entries().write(str(tmp_path / "a.json"))
    content = json.loads((tmp_path / "a.json").read_text())
    assert_expected_inline("\n".join(json.dumps(event) for event in content["traceEvents"]), """\
{"name": "model", "cat": "prefill", "ph": "X", "ts": 0.0, "dur": 1500.0, "pid": 0, "tid": 0, "args": {"phase": "prefill"}}
{"name": "mlstm", "cat": "forward", "ph": "X", "ts": 10.0, "dur": 500.0, "pid": 1, "tid": 0, "args": {"phase": "forward", "schedule": "inductor", "layer": 0, "band": 0, "segment": 1, "bytes": 1000}}
{"name": "queue depth", "id": "mlstm", "ph": "C", "ts": 10.0, "pid": 1, "tid": 0, "args": {"tasks": 2}}
{"name": "process_name", "ph": "M", "pid": 0, "args": {"name": "cuda:0"}}
{"name": "thread_name", "ph": "M", "pid": 0, "tid": 0, "args": {"name": "main"}}
{"name": "process_name", "ph": "M", "pid": 1, "args": {"name": "cpu"}}
{"name": "thread_name", "ph": "M", "pid": 1, "tid": 0, "args": {"name": "main"}}""")  # noqa: E501


def test_summary_groups_by_op_phase_and_device() -> None:
    assert_expected_inline(_two_entries().summary(), """\
op     phase    device  count  total ms  mean us  max us  GB/s
model  prefill  cuda:0      1      1.50   1500.0  1500.0     -
mlstm  forward  cpu         1      0.50    500.0   500.0   0.0""")


def test_a_file_that_cannot_be_written_is_an_error_before_any_work(tmp_path: Path) -> None:
    messages = []
    (tmp_path / "folder.csv").mkdir()
    for name in ("no/such/a.csv", "folder.csv", "a.txt"):
        with pytest.raises(ValueError, match="trace must be") as caught, trace.record(str(tmp_path / name)):
            raise AssertionError("the block ran")
        messages.append(str(caught.value).replace(str(tmp_path), "DIR"))
    assert_expected_inline("\n".join(messages), """\
trace must be a file that can be written, got 'DIR/no/such/a.csv', whose directory is not there
trace must be a file that can be written, got 'DIR/folder.csv', which is a directory
trace must be a file name ending in .csv, .jsonl or .json, got 'DIR/a.txt'""")


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("old")

    def interrupted() -> None:
        with files.replacing(str(path)) as file:
            file.write("half")
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.csv"]


def test_the_trace_setting_records_until_finish(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    config.reload(flags={"trace": str(path)})
    with trace.span("op"):
        pass
    with trace.record() as inner, trace.span("op"):
        pass
    assert trace.active()
    recording = trace.finish()
    assert recording is not None
    assert (len(recording.entries()), len(inner.entries())) == (2, 1)
    assert len(path.read_text().splitlines()) == 3
    assert trace.finish() is None


def test_a_record_block_that_loads_the_setting_does_not_end_it(tmp_path: Path) -> None:
    with trace.record():
        config.reload(flags={"trace": str(tmp_path / "a.csv")})
    assert trace.active()
    with trace.span("op"):
        pass
    config.reload(flags={})
    assert (tmp_path / "a.csv").exists()


def test_an_empty_recording_keeps_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("earlier")
    config.reload(flags={"trace": str(tmp_path / "a.csv")})
    config.reload(flags={})
    assert (tmp_path / "a.csv").read_text() == "earlier"


def test_the_variable_records_the_whole_process(tmp_path: Path) -> None:
    code = ("from torch_xlstm_ops import config, trace\nconfig.current()\n"
            "with trace.span('op', phase='decode'): pass")
    environment = {**os.environ, "XLSTM_OPS_TRACE": "a.jsonl"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, timeout=120)
    assert json.loads((tmp_path / "a.jsonl").read_text())["phase"] == "decode"
