"""What the emulator needs of this machine."""

from __future__ import annotations

import platform
import shutil
import sys

import torch

TORCH_VERSION = "2.13"


def missing() -> str | None:
    """Return why the emulator cannot run here, or None when it can."""
    if not sys.platform.startswith("linux"):
        return f"the MPS emulator runs on Linux, this is {sys.platform}"
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"the MPS emulator switches stacks in x86-64 assembly, this is {platform.machine()}"
    if not torch.__version__.startswith(f"{TORCH_VERSION}."):
        return f"the MPS emulator is written for torch {TORCH_VERSION}, this is {torch.__version__}"
    if torch._C._has_mps:
        return "this torch has MPS itself"
    if shutil.which("g++") is None:
        return "the MPS emulator compiles Metal with g++, which is not installed"
    return None
