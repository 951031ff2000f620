"""Laws and texts of plans: every token of every row once, within the resources of the machine."""

from __future__ import annotations

import pytest
from expecttest import assert_expected_inline
from hypothesis import given
from hypothesis import strategies as st

from torch_xlstm_ops.config import Config, Schedule
from torch_xlstm_ops.schedules.plan import Machine, Plan, Shape, make

sizes = st.none() | st.integers(1, 9)
configs = st.builds(
    Config, schedule=st.sampled_from([Schedule.QUEUED, Schedule.INDUCTOR]), chunk_size=st.none() | st.integers(1, 100),
    segment=st.none() | st.integers(1, 5000), heads_per_band=sizes, workers=sizes, streams=sizes, window=sizes,
    mem_fraction=st.none() | st.floats(0.001, 1),
)
shapes = st.builds(Shape, st.integers(0, 20), st.integers(0, 10_000), st.integers(1, 300), st.integers(1, 600))
machines = st.builds(Machine, st.integers(1, 8), st.booleans(), st.none() | st.integers(1 << 20, 1 << 36))
plans = st.builds(make, shapes, st.sampled_from(["cpu", "cuda", "mps"]), configs, machines)


@given(plans)
def test_bands_and_segments_tile_rows_and_tokens(plan: Plan) -> None:
    assert [row for band in plan.bands for row in range(band.start, band.stop)] == list(range(plan.rows))
    assert [t for segment in plan.segments for t in range(segment.start, segment.stop)] == list(range(plan.tokens))
    assert all(segment.chunks * plan.chunk_size >= segment.stop - segment.start for segment in plan.segments)


@given(shapes, st.sampled_from(["cpu", "cuda", "mps"]), configs, machines)
def test_plans_use_no_more_than_the_machine_has(shape: Shape, device: str, config: Config, machine: Machine) -> None:
    plan = make(shape, device, config, machine)
    tasks = max(1, len(plan.bands) * (len(plan.segments) if device == "cpu" else 1))
    assert 1 <= plan.workers <= min(machine.threads, tasks, plan.window)
    assert 0 <= plan.streams <= plan.workers * machine.streams
    assert 1 <= plan.window <= (config.window or plan.window)
    if device == "cpu" and plan.schedule is Schedule.QUEUED:
        assert plan.workers * plan.threads <= machine.threads
    if plan.schedule is Schedule.QUEUED:
        asked = {"worker": (config.workers, plan.workers), "stream": (config.streams, plan.streams)}
        for what, (wanted, used) in asked.items():
            assert (wanted or 0) <= used or any(f"{what}s used" in n or f"{what} used" in n for n in plan.notes)


@given(plans)
def test_the_text_of_a_plan_fits_a_screen(plan: Plan) -> None:
    assert all(len(line) <= 100 for line in str(plan).splitlines())
    assert str(plan).count("\n") < 24


def queued(**fields: object) -> Config:
    return Config(schedule=Schedule.QUEUED, **fields)  # type: ignore[arg-type]


def test_text_of_a_plan() -> None:
    plan = make(Shape(8, 8192, 256, 512), "cpu", queued(heads_per_band=2), Machine(2))
    assert_expected_inline(str(plan), """\
schedule  queued
rows      8 in 4 bands of 2
tokens    8192 in 8 segments of 1024 by 128
workers   2, 1 thread each
window    2 tasks in flight, about 90.0 MB

band 0    0 -> 1 -> 2 -> 3 -> 4 -> 5 -> 6 -> 7
band 1    0 -> 1 -> 2 -> 3 -> 4 -> 5 -> 6 -> 7
band 2    0 -> 1 -> 2 -> 3 -> 4 -> 5 -> 6 -> 7
band 3    0 -> 1 -> 2 -> 3 -> 4 -> 5 -> 6 -> 7""")


def test_text_of_a_plan_with_a_scan_over_summaries() -> None:
    plan = make(Shape(2, 4096, 256, 512), "cpu", queued(heads_per_band=2, segment=1024), Machine(2))
    assert_expected_inline(str(plan), """\
schedule  queued
rows      2 in 1 band of 2
tokens    4096 in 4 segments of 1024 by 128
workers   2, 1 thread each
window    2 tasks in flight, about 90.0 MB

band 0    0 ~> 1 -> 2 ~> 3""")


def test_a_note_says_that_two_bands_use_two_of_six_workers() -> None:
    plan = make(Shape(2, 4096, 256, 512), "cpu", queued(heads_per_band=1, segment=4096, workers=6), Machine(6))
    assert_expected_inline("\n".join(plan.notes), """2 bands of 1 segment: 2 of 6 workers used""")


def test_notes_where_a_device_has_less() -> None:
    asked = queued(workers=4, streams=2, window=3, heads_per_band=4)
    mps = make(Shape(8, 65536, 256, 512), "mps", asked, Machine(8))
    assert_expected_inline("\n".join(mps.notes), """\
MPS takes one submitting thread: 1 of 4 workers used
mps has no streams of our own: 0 of 2 streams used""")
    cuda = make(Shape(8, 65536, 256, 512), "cuda", queued(workers=4, streams=3, heads_per_band=4), Machine(16, True))
    assert_expected_inline("\n".join(cuda.notes), """\
2 bands: 2 of 4 workers used
2 workers: 2 of 3 streams used""")


def test_memory_bounds_the_window() -> None:
    asked = queued(mem_fraction=0.5, window=64)
    plan = make(Shape(64, 65536, 256, 512), "cpu", asked, Machine(2, memory=256 << 20))
    assert plan.window * plan.task_bytes <= 128 << 20
    assert_expected_inline("\n".join(plan.notes), """0.5 of the memory: 5 of 64 tasks used""")


@pytest.mark.parametrize("tokens", [0, 1, 20, 100, 5000])
def test_a_chunk_is_not_much_longer_than_the_sequence(tokens):
    given = make(Shape(4, tokens, 64, 64), "cpu", Config(chunk_size=1_000_000))
    usual = make(Shape(4, tokens, 64, 64), "cpu", Config())
    assert given.chunk_size <= max(usual.chunk_size, 2 * tokens)
