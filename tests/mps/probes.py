"""What the emulator's self-test runs: the device, hand-written kernels right and wrong, and Inductor's reductions."""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import emulator

SHADERS = {
    "double": """
        kernel void run(device float* out, constant float* in, uint i [[thread_position_in_grid]]) {
            out[i] = 2.0 * in[i];
        }""",
    # Each thread reads its neighbour's result: the value depends on which of the two runs first.
    "race": """
        kernel void run(device float* out, constant float* in, uint i [[thread_position_in_grid]]) {
            out[i] = i > 0 ? out[i - 1] + in[i] : in[i];
        }""",
    "race_in_threadgroup": """
        [[max_total_threads_per_threadgroup(64)]]
        kernel void run(device float* out, constant float* in, uint i [[thread_position_in_grid]],
                        uint t [[thread_position_in_threadgroup]]) {
            threadgroup float shared[64];
            shared[t] = in[i];
            out[i] = shared[63 - t];
        }""",
    # In place: every thread stores what all of them still have to read.
    "race_in_place": """
        [[max_total_threads_per_threadgroup(64)]]
        kernel void run(device float* out, constant float* in, uint i [[thread_position_in_grid]],
                        uint t [[thread_position_in_threadgroup]]) {
            threadgroup_barrier(metal::mem_flags::mem_threadgroup);
            out[0] = in[0] + 1.0;
        }""",
    # The same, stored only after a barrier: every thread has read by then.
    "in_place_after_barrier": """
        [[max_total_threads_per_threadgroup(64)]]
        kernel void run(device float* out, constant float* in, uint i [[thread_position_in_grid]],
                        uint t [[thread_position_in_threadgroup]]) {
            float before = in[0];
            threadgroup_barrier(metal::mem_flags::mem_threadgroup);
            if (t == 0) out[0] = before + 1.0;
        }""",
    "out_of_bounds": """
        kernel void run(device float* out, constant float* in, uint i [[thread_position_in_grid]]) {
            out[i] = in[i + 1];
        }""",
    "divergent_barrier": """
        [[max_total_threads_per_threadgroup(64)]]
        kernel void run(device float* out, constant float* in, uint i [[thread_position_in_grid]],
                        uint t [[thread_position_in_threadgroup]]) {
            if (t < 32) threadgroup_barrier(metal::mem_flags::mem_threadgroup);
            out[i] = in[i];
        }""",
    "texture": """
        kernel void run(device float* out, texture2d<float> in [[texture(0)]],
                        uint i [[thread_position_in_grid]]) {
            out[i] = 0;
        }""",
    "unknown_function": """
        kernel void run(device float* out, constant float* in, uint i [[thread_position_in_grid]]) {
            out[i] = metal::no_such_function(in[i]);
        }""",
    "32_buffers": "kernel void run(device float* out, "
    + ", ".join(f"constant float* in{i}" for i in range(31))
    + ", uint i [[thread_position_in_grid]]) { out[i] = in0[i]; }",
}


def basics() -> dict[str, Any]:
    """Run every probe that is quick, in one process."""
    return {
        "device": device(), "shaders": {name: shader(name) for name in SHADERS}, "threads": unsynchronised_threads(),
    }


def device() -> dict[str, Any]:
    """Report where tensors live, what is refused, and how host traffic is recorded."""
    x = torch.arange(6.0).to("mps")
    with emulator.recording() as log:
        x.sum().item()
        (x.view(2, 3) @ x.view(3, 2)).cpu()
        torch.ones(2).to("mps")
    try:
        torch.empty(1, dtype=torch.float64, device="mps")
        refused = ""
    except TypeError as error:
        refused = str(error)
    event = torch.Event("mps")
    event.record()
    event.synchronize()
    return {
        "device": str(x.device),
        "event": event.query(),
        "available": torch.backends.mps.is_available(),
        "float64": refused,
        "round_trips": [call.op for call in log.aten if call.waits_for_device],
        "uploads": [call.op for call in log.aten if call.reads_host],
        "views": [call.op for call in log.calls if call.is_view],
        "compute": [call.op for call in log.aten if not call.waits_for_device and not call.reads_host],
    }


def shader(name: str) -> dict[str, Any]:
    """Run a hand-written kernel in every order; report its results, statistics and error."""
    report: dict[str, Any] = {"results": [], "statistics": [], "error": ""}
    try:
        kernel = torch.mps.compile_shader("#include <c10/metal/utils.h>\nusing namespace metal;" + SHADERS[name]).run
        for order in emulator.ORDERS:
            emulator.set_order(order)
            data, out = torch.arange(64.0).to("mps"), torch.zeros(64).to("mps")
            target = data if "in_place" in name else out
            with emulator.recording() as log:
                kernel(target, data, threads=[64], **({"group_size": [64]} if "max_total" in SHADERS[name] else {}))
            report["results"].append(out.tolist())
            report["statistics"].append(log.launches[0].statistics)
    except Exception as error:
        report["error"] = f"{type(error).__name__}: {error}"
    return report


def reductions(mutation: str) -> dict[str, Any]:
    """Compile reductions of every kind that Inductor emits; report the error in each order.

    mutation: what the headers were broken with, only to tell one job from another.
    """
    torch.manual_seed(0)
    inputs = torch.randn(4, 100), torch.randn(4, 500), torch.randn(4, 512), torch.randn(2, 3000)

    def reduce(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, ...]:
        return a.softmax(-1), b.sin().sum(-1), F.layer_norm(c, (512,)), F.layer_norm(d, (3000,))

    compiled = torch.compile(reduce, fullgraph=True)
    errors: dict[str, Any] = {}
    for order in emulator.ORDERS:
        emulator.set_order(order)
        try:
            results = compiled(*(x.to("mps") for x in inputs))
            pairs = zip(results, reduce(*inputs), strict=True)
            # NaN, what threadgroup memory starts as, must not pass for a small number.
            errors[str(order)] = max(torch.nan_to_num(got.cpu() - want, nan=torch.inf).abs().max().item()
                                     for got, want in pairs)
        except RuntimeError as error:
            errors[str(order)] = str(error).splitlines()[0]
    return {"mutation": mutation, "errors": errors}


def unsynchronised_threads() -> dict[str, Any]:
    """Let two threads use the device without a lock: the overlap that the emulator must see."""
    def work() -> None:
        x = torch.ones(8).to("mps")
        for _ in range(20):
            x = x * 1.5

    with emulator.recording(linger_us=500) as log:
        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    return {
        "threads": len({call.thread for call in log.aten}),
        "overlapped": sum(call.overlapped for call in log.aten),
        "submissions": len(log.aten),
    }
