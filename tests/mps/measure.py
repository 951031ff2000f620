"""What the kernel tests run: compiled functions and whole ops on the emulated device, each measured."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import torch
from torch._inductor.codegen.mps import MetalKernel
from torch.utils._ordered_set import OrderedSet

from torch_xlstm_ops import config, schedules
from torch_xlstm_ops.runtime import compiler, devices

from . import cases, emulator
from .instrument import Call, Instrument, relative_errors
from .operations import OPERATIONS

LINGER_US = 300


def function(name: str) -> dict[str, Any]:
    """Run one compiled function in every dtype and with every kind of gates."""
    row, report = cases.functions()[name], {}
    for dtype in cases.DTYPES:
        _forget_headers()
        instrument = Instrument(checks=len(cases.GATES))
        instrument.install()
        with emulator.recording() as log:
            for gates in cases.GATES if "fgate" in row.names else ("usual",):
                args = [t.to("mps") for t in cases.arguments(row, cases.DTYPES[dtype], gates)]
                compiler.get(row.fn, row.axes, args, **row.static)(args)
        report[dtype] = [_call(call, log) for call in instrument.calls]
    return report


def operation(name: str, dtype: str) -> dict[str, Any]:
    """Run a whole op, or its gradient, on ``mps:0`` through the dispatcher."""
    run = OPERATIONS[name]
    if reason := schedules.unavailable(config.Schedule(run.schedule), torch.device("mps")):
        return {"unavailable": reason}
    instrument = Instrument(checks=1)
    instrument.install()
    args = run.arguments(cases.DTYPES[dtype])
    with config.use(**run.config), emulator.recording() as log:
        on_device, gradients = ([t.to("mps") for t in ts] for ts in (args, run.gradients(args)))
        start = emulator.sequence()
        results = run.call(on_device, gradients)
        stop = emulator.sequence()
    exact = run.oracle([t.double() for t in args], [t.double() for t in run.gradients(args)])
    eager = run.eager(args, run.gradients(args))
    entries = [e for e in log.submissions if start <= e.sequence < stop and not instrument.is_own(e.sequence)]
    aten = [e for e in entries if isinstance(e, emulator.AtenCall)]
    return {
        "errors": relative_errors(results, exact),
        "eager_errors": relative_errors(eager, exact),
        "kernels": len(entries) - len(aten),
        "aten": dict(Counter(e.name for e in aten)),
        "round_trips": [e.name for e in aten if e.waits_for_device],
        "uploads": [e.name for e in aten if e.reads_host],
        "calls": [_call(call, log) for call in instrument.calls],
    }


def threads(name: str, count: int) -> dict[str, Any]:
    """Run one op from several threads at once, with and without the lock that keeps submissions apart."""
    run = OPERATIONS[name]
    args = [t.to("mps") for t in run.arguments(torch.float32)]
    with config.use(**run.config):
        expected = run.call(args, [])
    results: list[Any] = []
    barrier = threading.Barrier(count)

    def work() -> None:
        barrier.wait(60)
        for _ in range(3):
            with config.use(**run.config):  # a thread has a configuration of its own
                results.append(run.call(args, []))

    def overlaps() -> tuple[int, int, int]:
        with emulator.recording(linger_us=LINGER_US) as log:
            workers = [threading.Thread(target=work) for _ in range(count)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join(120)
        entries = log.submissions
        return sum(e.overlapped for e in entries), len({e.thread for e in entries}), len(entries)

    locked = overlaps()
    same = all(torch.equal(g, e) for result in results for g, e in zip(result, expected, strict=True))
    lock, devices.events.mps_lock = devices.events.mps_lock, devices.events._UNLOCKED  # type: ignore[assignment]
    unlocked = overlaps()
    devices.events.mps_lock = lock
    return {"locked": locked, "unlocked": unlocked, "results_equal": same, "runs": len(results)}


def model(dtype: str, tokens: int) -> dict[str, Any]:
    """Run a transformers xLSTM, patched, on ``mps:0``: a prompt, then three tokens one by one."""
    from torch_xlstm_ops.patch import patch

    ours, peer = cases.xlstm_model(), cases.xlstm_model().double()
    ids = torch.randint(61, (2, tokens + 3), generator=torch.Generator().manual_seed(0))
    expected = cases.logits(peer, ids, tokens)
    eager = cases.logits(cases.xlstm_model().to(cases.DTYPES[dtype]), ids, tokens)
    instrument = Instrument(checks=0)
    instrument.install()
    with patch("transformers"):
        ours = ours.to(cases.DTYPES[dtype]).to("mps")
        on_device = ids.to("mps")
        with emulator.recording() as log:
            got = cases.logits(ours, on_device, tokens)
    return {
        "error": relative_errors([got], [expected])[0],
        "eager_error": relative_errors([eager], [expected])[0],
        "aten": dict(Counter(call.name for call in log.aten)),
        "round_trips": [call.name for call in log.aten if call.waits_for_device],
        "calls": [_call(call, log) for call in instrument.calls],
    }


def _call(call: Call, log: emulator.Log) -> dict[str, Any]:
    launches = [entry for entry in log.launches if call.start <= entry.sequence < call.stop]
    aten = [entry for entry in log.aten if call.start <= entry.sequence < call.stop]
    return {
        "function": call.function,
        "sizes": call.sizes,
        "errors": call.errors,
        "eager_errors": call.eager_errors,
        "launches": [report_launch(launch) for launch in launches],
        "aten": dict(Counter(entry.name for entry in aten)),
        "round_trips": [entry.name for entry in aten if entry.waits_for_device or entry.reads_host],
    }


def report_launch(launch: emulator.Launch) -> dict[str, Any]:
    """Return what the tests ask of a launch."""
    return {
        "kernel": launch.kernel, "source": launch.source, "threads": launch.threads, "group": launch.group,
        "buffers": len(launch.buffers), "statistics": launch.statistics,
    }


def _forget_headers() -> None:
    """Start as a new process would: the headers that one kernel needs leak into all later ones."""
    MetalKernel.headers = OrderedSet(["utils"])
