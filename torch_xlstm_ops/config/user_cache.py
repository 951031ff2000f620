"""The package's own folder among the user's caches."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def folder() -> Path:
    """Return the folder, in the place that the system has for caches; it may not exist."""
    if os.environ.get("XDG_CACHE_HOME"):
        base = Path(os.environ["XDG_CACHE_HOME"])
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path.home() / ".cache"
    return base / "torch_xlstm_ops"


def kernels(setting: str) -> Path | None:
    """Return the folder that the `kernels` setting means; None for off, and for on where the user has no home."""
    if setting == "off":
        return None
    try:
        return folder() / "kernels" if setting == "on" else Path(setting).expanduser()
    except RuntimeError:  # no home directory is known
        return None
