"""What `xlstm-ops tune` found to be fastest, for ``schedule="auto"`` to use: one JSON file for each user.

    {"version": 1, "winners": {KEY: {"settings": {"schedule": "queued", "chunk_size": 64, ...}, ...}}}

A key names the device, torch, and the kind of call. The file is read once, when the first call is planned; an entry
that makes no sense is left out with a warning, and the default runs.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from torch_xlstm_ops import config
from torch_xlstm_ops.trace import export

VERSION = 1
FIELDS = ("schedule", "chunk_size", "segment", "heads_per_band", "workers", "streams", "window")

Settings = Mapping[str, object]


class Kind(NamedTuple):
    """What a winner is for: calls of one kind of size on one device, under one torch."""

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


def kind(
    device: torch.device, dtype: torch.dtype, rows: int, tokens: int, DHQK: int, DHHV: int, *, training: bool
) -> Kind:
    """Return what calls of these sizes are kept under."""
    use = "training" if training else "forward"
    name = str(dtype).removeprefix("torch.")
    return Kind(device_name(device), torch.__version__, use, name, bucket(rows), bucket(tokens), DHQK, DHHV)


def bucket(size: int) -> int:
    """Return the least power of two that is at least `size`."""
    return 1 << max(size - 1, 0).bit_length()


def device_name(device: torch.device) -> str:
    """Return a device's name as its maker has it; for a CPU with the threads that the caller may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return getattr(torch.backends.mps, "get_name", lambda: "Apple GPU")()
    return f"{_processor()}, {torch.get_num_threads()} threads"


@functools.cache
def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            found = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "")
    except OSError:  # not Linux
        found = ""
    return found or platform.processor() or platform.machine()


def place(tuned: str) -> Path | None:
    """Return the file that the `tuned` setting means: None for off, and for on the user's own."""
    if tuned == "off":
        return None
    return _own() if tuned == "on" else Path(tuned)


def _own() -> Path:
    if os.environ.get("XDG_CACHE_HOME"):
        base = Path(os.environ["XDG_CACHE_HOME"])
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path.home() / ".cache"
    return base / "torch_xlstm_ops" / "tuned.json"


def find(tuned: str, wanted: Kind) -> Settings | None:
    """Return the settings that won for a kind of call, or None.

    tuned: the setting of that name.
    """
    path = place(tuned)
    entry = None if path is None else entries(path).get(str(wanted))
    return None if entry is None else entry["settings"]


@functools.cache
def entries(path: Path) -> Mapping[str, Any]:
    """Return the entries of a file by `Kind`, those that make sense; warn of the rest. Read once: see `forget`."""
    try:
        found = read(path)
    except FileNotFoundError:
        return MappingProxyType({})
    except (OSError, ValueError) as error:
        warnings.warn(f"tuned plans are not used: {error}", RuntimeWarning, stacklevel=2)
        return MappingProxyType({})
    good = {}
    for key, entry in found.items():
        try:
            settings = checked(entry, f"{key} in {path}")
            good[key] = {**entry, "settings": settings}
        except ValueError as error:
            warnings.warn(f"a tuned plan is not used: {error}", RuntimeWarning, stacklevel=2)
    return MappingProxyType(good)


def forget() -> None:
    """Read files again at their next use."""
    entries.cache_clear()


def read(path: Path) -> dict[str, Any]:
    """Return the entries of a file, unchecked.

    Raises OSError if it cannot be read, ValueError if it is not such a file.
    """
    text = path.read_text(encoding="utf-8")
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} must be JSON, got: {error}") from None
    if not isinstance(found, dict) or found.get("version") != VERSION or not isinstance(found.get("winners"), dict):
        version = found.get("version") if isinstance(found, dict) else None
        raise ValueError(f"{path} must be a file of tuned plans of version {VERSION}, got version {version!r}")
    return dict(found["winners"])


def checked(entry: object, where: str) -> Settings:
    """Return the settings of an entry as `Config` has them.

    Raises ValueError for anything but settings of a plan with values that it can take.
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
        raise ValueError(f"schedule of {where} must not be auto, which looks here, got auto")
    return MappingProxyType(found)


def store(path: Path, changes: Mapping[str, Any]) -> None:
    """Put entries into a file, whole or not at all; one that is None leaves it.

    A file that cannot be read as such is replaced. Raises OSError if it cannot be written.
    """
    try:
        merged = read(path)
    except (OSError, ValueError):
        merged = {}
    merged.update(changes)
    kept = {key: entry for key, entry in sorted(merged.items()) if entry is not None}
    path.parent.mkdir(parents=True, exist_ok=True)
    with export.whole_file(str(path)) as file:
        json.dump({"version": VERSION, "winners": kept}, file, indent=1)
    forget()
