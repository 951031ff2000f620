"""Laws of the queued schedule: the same results as other schedules, for any plan and thread, also after errors."""

from __future__ import annotations

import functools
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests import together
from tests.oracle import GRADIENT_TOLERANCE, TOLERANCE, Sizes, assert_close, draw, exact, float32_tolerance, weigh
from torch_xlstm_ops import config, mlstm_chunkwise, trace
from torch_xlstm_ops.config import Schedule
from torch_xlstm_ops.runtime import devices
from torch_xlstm_ops.schedules import sequential
from torch_xlstm_ops.schedules.plan import Plan
from torch_xlstm_ops.schedules.queue import worker_threads
from torch_xlstm_ops.schedules.queue.band_queues import SequentialQueue
from torch_xlstm_ops.schedules.queue.task_runner import TaskError, TaskRunner

L = 16  # as in test_mlstm_ops: each new size is a compile
CPU = torch.device("cpu")
ONE_BAND = {"segment": 2 * L, "heads_per_band": 6}  # which workers share by a scan over summaries


@pytest.fixture(autouse=True, scope="module")
def _three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def queued(args: Sequence[Tensor]) -> list[Tensor]:
    h, state = mlstm_chunkwise(*args, chunk_size=L, schedule="queued")
    return [h, *state]


# More threads than cores make each example slow.
FEWER = settings(max_examples=max(5, settings().max_examples // 4))
drawn_plans = st.fixed_dictionaries({
    "segment": st.integers(1, 100), "heads_per_band": st.integers(1, 7), "workers": st.integers(1, 4),
    "window": st.none() | st.integers(1, 5),
})


@pytest.mark.slow
@FEWER
@given(S=st.integers(1, 130), seed=st.integers(0, 2**16), plan=drawn_plans)
def test_no_plan_changes_the_result(S, seed, plan):
    args = draw(Sizes(S=S), seed=seed)
    with config.use(**plan):
        found = queued(args)
    wanted = exact(args)
    assert_close(found, wanted, float32_tolerance(args, wanted[0]))


@pytest.mark.slow
@FEWER
@given(S=st.integers(1, 80), seed=st.integers(0, 2**16), plan=drawn_plans)
def test_no_plan_changes_the_gradients(S, seed, plan):
    args = [t.requires_grad_() for t in draw(Sizes(S=S), seed=seed)]
    with config.use(**plan):
        found = torch.autograd.grad(weigh(queued(args)), args)
    wide = [t.detach().double().requires_grad_() for t in args]
    assert_close(found, torch.autograd.grad(weigh(exact(wide)), wide), GRADIENT_TOLERANCE[torch.float32])


@pytest.mark.slow
def test_gradients_equal_inductors():
    args, found = [t.requires_grad_() for t in draw(Sizes(S=100))], {}
    for schedule in ("queued", "inductor"):
        with config.use(segment=2 * L, heads_per_band=2):
            h, state = mlstm_chunkwise(*args, chunk_size=L, schedule=schedule)
            found[schedule] = torch.autograd.grad(weigh([h, *state]), args)
    # Workers have a thread each, the caller three: sums are split differently, and denominators near 0 magnify that.
    assert_close(found["queued"], found["inductor"], GRADIENT_TOLERANCE[torch.float32])


@pytest.mark.parametrize("plan", [{"segment": 2 * L, "heads_per_band": 1}, ONE_BAND], ids=["bands", "scan"])
def test_a_call_repeated_gives_the_same_bits(plan):
    args = draw(Sizes(S=200))
    with config.use(**plan):
        first = queued(args)
        for _ in range(20):
            assert all(torch.equal(a, b) for a, b in zip(queued(args), first, strict=True))


@pytest.mark.parametrize("stream", range(5), ids=["q", "k", "v", "igate", "fgate"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("plan", [{"segment": L}, {"segment": L, "heads_per_band": 6}], ids=["bands", "scan"])
def test_nan_and_infinity_spread_as_in_the_recurrence(stream, value, plan):
    args = draw(Sizes(S=70))
    args[stream][0, 1, 22] = value
    with config.use(**plan):
        found = queued(args)
    for a, b in zip(found, exact(args), strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())
    assert found[0][:, 0].isfinite().all()


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("plan", [{"segment": L}, ONE_BAND], ids=["bands", "scan"])
def test_modes_of_the_caller_hold_on_workers(mode, plan):
    with config.use(**plan), mode():
        args = draw(Sizes(S=70))
        assert_close(queued(args), exact(args), TOLERANCE[torch.float32])


def test_workers_leave_the_number_of_threads_alone():
    worker_threads.close()
    queued(draw(Sizes(S=100)))
    elsewhere = []
    thread = threading.Thread(target=lambda: elsewhere.append(torch.get_num_threads()))
    thread.start()
    thread.join(60)
    assert (torch.get_num_threads(), elsewhere) == (3, [3])


def test_workers_keep_to_their_number_of_threads():
    queued(draw(Sizes(S=100)))
    found: queue.SimpleQueue[int] = queue.SimpleQueue()
    workers = worker_threads.get(1)
    together = threading.Barrier(3)  # no thread serves two

    def count() -> None:
        together.wait(30)
        found.put(torch.get_num_threads())

    workers.submit(count, 3)
    assert [found.get(timeout=30) for _ in range(3)] == [1, 1, 1]


def test_a_trace_names_each_task_and_how_many_were_in_flight():
    args = draw(Sizes(S=100))
    trace.set_layer(7)
    with config.use(segment=2 * L, heads_per_band=2, window=2), trace.record() as recording:
        queued(args)
    trace.set_layer(None)
    entries = recording.entries()
    assert sorted((e.band, e.segment) for e in entries) == [(b, s) for b in range(3) for s in range(4)]
    assert {(e.layer, e.schedule, e.phase) for e in entries} == {(7, "queued", "forward")}
    assert {e.queue_depth for e in entries} <= {1, 2}


# Accidents


def test_an_error_names_its_task_and_leaves_nothing_running(monkeypatch):
    run, done = sequential.run, []

    def failing(kernels, rows, band, segment, state):
        if (band.start, segment.start) == (2, 2 * L):
            raise ArithmeticError("a cosmic ray")
        done.append(run(kernels, rows, band, segment, state))
        return done[-1]

    args = draw(Sizes(S=1000))
    with config.use(segment=2 * L, heads_per_band=2):
        monkeypatch.setattr(sequential, "run", failing)
        text = r"task .band 1, segment 1. of the queued schedule failed: ArithmeticError: a cosmic ray"
        with pytest.raises(TaskError, match=text) as caught:
            queued(args)
        count = len(done)
        assert (caught.value.band, caught.value.segment) == (1, 1)
        assert isinstance(caught.value.__cause__, ArithmeticError)
        time.sleep(0.05)
        assert len(done) == count < 3 * 32
        monkeypatch.undo()
        assert_close(queued(args), exact(args), 2 * TOLERANCE[torch.float32])


def runner(
    work: Callable[[int, int], None], *, bands: int = 3, segments: int = 4, workers: int = 3, window: int = 3
) -> TaskRunner:
    """Return a runner whose task (band, segment) is a call of `work`."""
    plan = Plan(Schedule.QUEUED, bands, segments, 1, 1, 1, workers=workers, window=window)
    queues = [SequentialQueue((s, lambda b=b, s=s: work(b, s)) for s in range(segments)) for b in range(bands)]
    return TaskRunner(plan, queues, CPU, "test", "forward")


def test_an_interrupt_stops_the_queue_and_leaves_no_thread_stuck():
    started = []

    def work(band: int, segment: int) -> None:
        started.append((band, segment))
        if len(started) == 4:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.02)

    with pytest.raises(KeyboardInterrupt):
        runner(work, segments=200).run()
    count = len(started)
    assert count < 100
    time.sleep(0.05)
    assert len(started) == count
    seen = []
    runner(lambda band, segment: seen.append((band, segment))).run()
    assert len(seen) == 12


@given(bands=st.integers(1, 5), segments=st.integers(1, 6), workers=st.integers(1, 3), window=st.integers(1, 4))
def test_order_within_a_band_and_the_window_hold(bands, segments, workers, window):
    lock, running, most, seen = threading.Lock(), set(), [0], []

    def work(band: int, segment: int) -> None:
        with lock:
            assert band not in running
            running.add(band)
            most[0] = max(most[0], len(running))
            seen.append((band, segment))
        time.sleep(0.0005)
        with lock:
            running.remove(band)

    runner(work, bands=bands, segments=segments, workers=workers, window=window).run()
    assert most[0] <= min(window, workers)
    for band in range(bands):
        assert [s for b, s in seen if b == band] == list(range(segments))


class _Slow:
    """An event of a device that finishes long after the call."""

    pending = 0
    most = 0
    lock = threading.Lock()

    def record(self) -> None:
        with self.lock:
            _Slow.pending += 1
            _Slow.most = max(_Slow.most, _Slow.pending)

    def synchronize(self) -> None:
        time.sleep(0.001)
        with self.lock:
            _Slow.pending -= 1


@pytest.mark.parametrize("workers", [1, 3])
def test_a_task_is_in_flight_until_its_device_work_has_finished(monkeypatch, workers):
    monkeypatch.setattr(devices, "has_events", lambda device: True)
    monkeypatch.setattr(devices, "event", lambda device: _Slow())
    _Slow.pending = _Slow.most = 0
    runner(lambda band, segment: None, segments=10, workers=workers, window=3).run()
    assert 2 <= _Slow.most <= 3


# Many callers


@pytest.mark.slow
def test_nested_calls_work():
    args = draw(Sizes(S=100))
    wanted, found = exact(args), []
    runner(lambda band, segment: found.append(queued(args)), segments=1).run()
    assert len(found) == 3
    for results in found:
        assert_close(results, wanted, TOLERANCE[torch.float32])


def test_a_thousand_calls_from_four_threads():
    cases = []
    for S, plan in ((40, {"segment": L}), (70, ONE_BAND), (33, {"workers": 2}), (5, {"window": 1})):
        args = draw(Sizes(S=S), seed=S)
        with config.use(**plan):
            cases.append((args, plan, queued(args)))
        assert_close(cases[-1][2], exact(args), TOLERANCE[torch.float32])
    before = threading.active_count()

    def calls(number: int) -> None:
        for turn in range(250):
            args, plan, wanted = cases[(number + turn) % len(cases)]
            with config.use(**plan):
                found = queued(args)
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))

    together.run([functools.partial(calls, number) for number in range(4)], seconds=300)
    assert threading.active_count() <= before


def test_worker_threads_close_and_start_again():
    args = draw(Sizes(S=40))
    for _ in range(3):
        assert_close(queued(args), exact(args), TOLERANCE[torch.float32])
        assert any(t.name.startswith(worker_threads.NAME) for t in threading.enumerate())
        worker_threads.close()
        assert not any(t.name.startswith(worker_threads.NAME) for t in threading.enumerate())


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_soak_for_ten_minutes_with_flat_memory():
    args = [t.requires_grad_() for t in draw(Sizes(S=300))]

    def calls(until: float) -> None:
        with config.use(**ONE_BAND):
            while time.monotonic() < until:
                torch.autograd.grad(weigh(queued(args)), args)

    used = []
    for minutes in (1, 4, 5):
        until = time.monotonic() + 60 * minutes
        together.run([functools.partial(calls, until)] * 4, seconds=60 * minutes + 120)
        used.append(devices.memory(CPU).used)
    assert used[-1] - used[0] < 32 << 20, used
