"""Tuned plans: the fastest settings that `xlstm-ops tune` found, in one JSON file a user, for ``schedule="auto"``.

    {"version": 1, "winners": {KEY: {"settings": {"schedule": "queued", "chunk_size": 64, ...}, ...}}}

A key names the device, torch, and the kind of call. The file is read once, when the first call is planned; an invalid
entry is skipped with a warning, and the default plan is used.
"""

from __future__ import annotations

import functools
import json
import platform
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from torch_xlstm_ops import config
from torch_xlstm_ops.config import user_cache
from torch_xlstm_ops.maths.shapes import dtype_name
from torch_xlstm_ops.runtime import bounded_read, files
from torch_xlstm_ops.runtime.devices import processor
from torch_xlstm_ops.runtime.state import on_reset

VERSION = 1
MAX_BYTES = 1 << 24  # of a file; an entry takes less than 1 KiB
FIELDS = ("schedule", "chunk_size", "segment", "heads_per_band", "workers", "streams", "window")

Settings = Mapping[str, object]


class Damaged(ValueError):
    """A file is not one of tuned plans."""


class CallKind(NamedTuple):
    """The key of an entry: calls with sizes of one bucket, on one device, with one version of torch."""

    device: str
    torch: str
    use: str  # forward or training
    dtype: str
    rows: int  # B * NH, up to the next power of two
    tokens: int  # likewise
    DHQK: int
    DHHV: int

    def __str__(self) -> str:
        return " | ".join(f"{name}={value}" for name, value in self._asdict().items())


def call_kind(
    device: torch.device, dtype: torch.dtype, rows: int, tokens: int, DHQK: int, DHHV: int, *, training: bool
) -> CallKind:
    """Return the key for calls of these sizes."""
    use = "training" if training else "forward"
    name = dtype_name(dtype)
    return CallKind(device_name(device), torch.__version__, use, name, bucket(rows), bucket(tokens), DHQK, DHHV)


def bucket(size: int) -> int:
    """Return `size` rounded up to a power of two."""
    return 1 << max(size - 1, 0).bit_length()


def device_name(device: torch.device) -> str:
    """Return the vendor's name of a device; for a CPU, with the number of threads that the caller may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return getattr(torch.backends.mps, "get_name", lambda: "Apple GPU")()
    return f"{_processor()}, {torch.get_num_threads()} threads"


@functools.cache
def _processor() -> str:
    return processor.facts().get("model name") or platform.processor() or platform.machine()


def place(tuned: str) -> Path | None:
    """Return the file that the `tuned` setting means: None for off, the user's default file for on."""
    if tuned == "off":
        return None
    return default_file() if tuned == "on" else Path(tuned)


def default_file() -> Path:
    """Return the user's file, in the cache folder of the system."""
    return user_cache.folder() / "tuned.json"


def find(tuned: str, wanted: CallKind) -> Settings | None:
    """Return the tuned settings for a kind of call, or None.

    tuned: the setting of that name.
    """
    path = place(tuned)
    entry = None if path is None else entries(path).get(str(wanted))
    return None if entry is None else entry["settings"]


@functools.cache
def entries(path: Path) -> Mapping[str, Any]:
    """Return the valid entries of a file by `CallKind`, and warn of the others. Read once: see `forget`."""
    try:
        found = read(path)
    except FileNotFoundError:
        return MappingProxyType({})
    except (OSError, ValueError) as error:
        warnings.warn(f"tuned plans are not used, run xlstm-ops tune again: {error}", RuntimeWarning, stacklevel=2)
        return MappingProxyType({})
    valid = {}
    for key, entry in found.items():
        try:
            settings = checked(entry, f"{key} in {path}")
            valid[key] = {**entry, "settings": settings}
        except ValueError as error:
            warnings.warn(f"a tuned plan is not used, run xlstm-ops tune again: {error}", RuntimeWarning, stacklevel=2)
    return MappingProxyType(valid)


@on_reset
def forget() -> None:
    """Read files again at their next use."""
    entries.cache_clear()


def read(path: Path) -> dict[str, Any]:
    """Return the entries of a file, unchecked.

    Raises OSError if it cannot be read, Damaged if it is not such a file, ValueError if a newer version wrote it, or
    if it is no regular file or larger than MAX_BYTES.
    """
    try:
        content = bounded_read.read_bytes(path, MAX_BYTES)
    except ValueError as error:
        raise ValueError(f"{path} must be a regular file of at most {MAX_BYTES} bytes, got: {error}") from None
    try:
        found = bounded_read.parse_json(content)
    except ValueError as error:
        raise Damaged(f"{path} must be JSON, got: {error}") from None
    version = found.get("version") if isinstance(found, dict) else None
    wrong = f"{path} must be a file of tuned plans of version {VERSION}, got version {version!r}"
    if type(version) is int and version > VERSION and "winners" in found:
        raise ValueError(wrong)
    if version != VERSION or not isinstance(found.get("winners"), dict):
        raise Damaged(wrong)
    return dict(found["winners"])


def checked(entry: object, where: str) -> Settings:
    """Return the settings of an entry as values of `Config`.

    Raises ValueError for an entry without a schedule, an unknown field, or a bad value.
    """
    settings = entry.get("settings") if isinstance(entry, dict) else None
    if not isinstance(settings, dict) or "schedule" not in settings:
        raise ValueError(f"{where} must have settings with a schedule, got {entry!r:.200}")
    for field in settings:
        if field not in FIELDS:
            raise ValueError(f"a setting of {where} must be one of {', '.join(FIELDS)}, got {field!r}")
    found = {field: config.check(config.SETTINGS[field].kind, value, f"{field} of {where}", text=False)
             for field, value in settings.items()}
    if found["schedule"] is config.Schedule.AUTO:
        raise ValueError(f"schedule of {where} must not be auto, got auto")
    return MappingProxyType(found)


def store(
    path: Path, changes: Mapping[str, Any], *, replace_damaged: bool = False, wait: float = files.LOCK_WAIT_S
) -> None:
    """Merge entries into a file, all or none, as the only writer of all threads and processes.

    changes: entries by `CallKind`; None removes one.
    replace_damaged: replace a file that is not one of tuned plans; default false. One of a newer version is kept.
    wait: seconds to wait for the lock, default 30.

    Raises ValueError for an existing file that is not replaced, OSError if the file cannot be written, TimeoutError if
    another process holds the lock for longer than `wait`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    target = path.resolve()
    with files.locked(target.with_name(f".{target.name}.lock"), wait):
        merged = {**_existing(target, replace_damaged), **changes}
        kept = {key: entry for key, entry in sorted(merged.items()) if entry is not None}
        with files.replacing(target) as file:
            json.dump({"version": VERSION, "winners": kept}, file, indent=1)
    forget()


def _existing(path: Path, replace_damaged: bool) -> dict[str, Any]:
    """Return the entries to merge with."""
    try:
        return {} if path.is_file() and not path.stat().st_size else read(path)
    except FileNotFoundError:
        return {}
    except Damaged:
        if replace_damaged:
            return {}
        raise
