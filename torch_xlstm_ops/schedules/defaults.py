"""Default sizes of a plan by kind of device, found by measurement, or for MPS by its limits. Pure data."""

from __future__ import annotations

from typing import NamedTuple

from torch_xlstm_ops.config import Schedule

STEP_TOKENS = 4  # up to this length a loop of steps is faster than a chunk
CUDA_WORKERS = 2  # one fills the gaps between the small kernels of the other


class DeviceDefaults(NamedTuple):
    """Default sizes for a kind of device."""

    chunk_size: int
    state_bytes: int  # limit of the chunk summaries of one task
    task_tokens: int  # limit of rows x tokens in one task
    segment_tokens: int  # limit of the tokens of one segment
    chunk_counts: tuple[int, ...] = ()  # allowed numbers of chunks in the last segment; empty: any
    gradient_tokens: int | None = None  # limit of rows x tokens in one task of a gradient; None: as `task_tokens`


# By device, then by the least DHQK.
_BY_DEVICE = {
    # A task's chunk summaries fit the cache, which takes a third of the time of all heads and 2,048 tokens in one task.
    # Four heads of 512 tokens take 0.67 to 0.9 of the time of one head of 1,024; with narrow heads, tasks up to four
    # times as large take another 0.8 to 0.9.
    "cpu": {
        0: DeviceDefaults(64, state_bytes=4 << 20, task_tokens=8192, segment_tokens=1024),
        128: DeviceDefaults(64, state_bytes=4 << 20, task_tokens=2048, segment_tokens=512),
        256: DeviceDefaults(128, state_bytes=4 << 20, task_tokens=2048, segment_tokens=512),
    },
    # Two or three bands hold about as much memory as other packages' kernels; the gaps between them cost 1 to 7%.
    "cuda": {
        0: DeviceDefaults(128, state_bytes=2 << 30, task_tokens=1 << 20, segment_tokens=1 << 20),
        128: DeviceDefaults(128, state_bytes=2 << 30, task_tokens=1 << 19, segment_tokens=1 << 20,
                            gradient_tokens=350 << 10),
        256: DeviceDefaults(256, state_bytes=2 << 30, task_tokens=1 << 20, segment_tokens=1 << 20,
                            gradient_tokens=1 << 18),
    },
    # Each new size of a matrix product takes memory that MPS never frees, so the last segment has one of few sizes.
    "mps": {
        0: DeviceDefaults(64, state_bytes=512 << 20, task_tokens=1 << 16, segment_tokens=1 << 16,
                  chunk_counts=(1, 2, 3, 4, 6, 8, 12, 16, 24, 32)),
    },
}
# Workers of one thread, each with its cache: chunks of 128 take 0.68 of the time of 64 at 8 heads of 256 x 512.
_QUEUED_CPU = {
    0: DeviceDefaults(64, state_bytes=4 << 20, task_tokens=1024, segment_tokens=1024),
    256: DeviceDefaults(128, state_bytes=4 << 20, task_tokens=1024, segment_tokens=1024),
}
_UNLIMITED = 1 << 62


def max_chunks(device: str) -> int:
    """Return the largest number of chunks in a segment; the product over chunks is quadratic in it.

    On CUDA each additional segment costs a copy of its streams: at 65,536 tokens two copies of 5.5 ms (H100).
    """
    return 512 if device == "cuda" else 64


def device_defaults(schedule: Schedule, device: str, DHQK: int) -> DeviceDefaults:
    """Return the defaults for a schedule on a type of device."""
    queued = schedule in (Schedule.QUEUED, Schedule.RAY)
    by_width = _QUEUED_CPU if queued and device == "cpu" else _BY_DEVICE.get(device, _BY_DEVICE["cpu"])
    found = by_width[max(width for width in by_width if width <= DHQK)]
    if schedule is Schedule.RAY:  # an actor cuts its task into segments again
        found = found._replace(state_bytes=_UNLIMITED, task_tokens=_UNLIMITED, segment_tokens=4096)
    return found
