"""Turns the emulated device on in this process, and reads what it recorded."""

from __future__ import annotations

import ctypes
import functools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils import _cpp_embed_headers

from . import build
from .log import Launch, Log, aten_call

CORES = 8
ORDERS = (0, 1, 2)

_launches: list[Launch] = []
_settings = {"order": 0, "dry": False}


@functools.cache
def native() -> ctypes.CDLL:
    """Return the extension, loaded: from here on this process has ``mps:0``."""
    library = ctypes.CDLL(str(build.extension()), mode=os.RTLD_GLOBAL)
    library.mps_emulator_enter.restype = ctypes.c_uint64
    library.mps_emulator_sequence.restype = ctypes.c_uint64
    library.mps_emulator_drain.restype = ctypes.c_char_p
    for name in ("mps_emulator_allocated", "mps_emulator_allocated_peak"):
        getattr(library, name).restype = ctypes.c_int64
    return library


@functools.cache
def start() -> None:
    """Give this process an MPS device. There is no way back: use a process of its own."""
    from .shader import Library

    library = native()
    replacements = {
        "_has_mps": True,
        "_mps_is_available": lambda: True,
        "_mps_is_on_macos_or_newer": lambda major, minor: True,
        "_mps_get_core_count": lambda: CORES,
        "_mps_get_name": lambda: "emulated",
        "_mps_deviceSynchronize": lambda: None,
        "_mps_emptyCache": lambda: None,
        "_mps_setMemoryFraction": lambda fraction: None,
        "_mps_currentAllocatedMemory": lambda: library.mps_emulator_allocated(),
        "_mps_driverAllocatedMemory": lambda: library.mps_emulator_allocated(),
        "_mps_recommendedMaxMemory": lambda: 16 << 30,
        "_mps_compileShader": Library,
    }
    for name, value in replacements.items():
        setattr(torch._C, name, value)
    torch.mps._default_mps_generator = torch.Generator()
    torch.backends.mps.is_available.cache_clear()
    if override := os.environ.get("MPS_EMULATOR_HEADERS"):
        _prefer_headers(Path(override))


def peak_bytes() -> int:
    """Return the largest number of bytes allocated at once since the last `recording` began."""
    return int(native().mps_emulator_allocated_peak())


def sequence() -> int:
    """Return the sequence number that the next submission will have."""
    return int(native().mps_emulator_sequence())


def set_order(order: int) -> None:
    """Run threads, SIMD groups and threadgroups forward (0), in reverse (1) or rotated by half (2)."""
    if order not in ORDERS:
        raise ValueError(f"order must be one of {ORDERS}, got {order}")
    _settings["order"] = order


def set_dry(dry: bool) -> None:
    """Record launches without compiling or running the kernels: for counting at full size."""
    _settings["dry"] = dry


def order() -> int:
    """Return the order that launches now use."""
    return int(_settings["order"])


def is_dry() -> bool:
    """Return whether launches are only recorded."""
    return bool(_settings["dry"])


def add_launch(launch: Launch) -> None:
    """Put a launch in the log that `recording` reads."""
    _launches.append(launch)


@contextmanager
def recording(*, linger_us: int = 0) -> Iterator[Log]:
    """Record every submission inside the block; `linger_us` lengthens each, so that overlaps become likely."""
    library, log = native(), Log()
    _launches.clear()
    library.mps_emulator_drain()
    library.mps_emulator_reset_peak()
    library.mps_emulator_linger(linger_us)
    library.mps_emulator_record(1)
    try:
        yield log
    finally:
        library.mps_emulator_record(0)
        library.mps_emulator_linger(0)
        log.launches += _launches
        log.calls += [aten_call(json.loads(line)) for line in library.mps_emulator_drain().splitlines()]


def _prefer_headers(folder: Path) -> None:
    """Take c10/metal headers from `folder` where it has them: how the self-test breaks them on purpose."""
    original = _cpp_embed_headers._embed_headers

    def embed(content: list[str], include_dirs: list[Path], processed_files: set[str]) -> str:
        return original(content, [folder, *include_dirs], processed_files)

    _cpp_embed_headers._embed_headers = embed
