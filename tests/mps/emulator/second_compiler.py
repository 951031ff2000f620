"""Generated Metal through clang in C++ for OpenCL mode, which has Metal's address spaces where g++ has none.

It refuses what Apple's compiler would: a pointer into another address space, a store through `constant`, a conversion
that bfloat lacks. Nothing is run. It takes `double`, which Metal does not have.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

SHIM = Path(__file__).parent / "clang/shim.h"
NAMES = ("clang++-19", "clang++-20", "clang++-21", "clang++")
OLDEST = 19
METAL_VERSION = 310  # Metal 3.1, of macOS 14
FLAGS = (
    "-x", "clcpp", "-cl-std=clc++2021", "-cl-single-precision-constant", "-fsyntax-only", "-Wno-everything",
    "-target", "spir64-unknown-unknown",
)
# What Metal's attributes say is for the launch; the shim stands for Apple's headers.
REMOVED = (
    r"#include <[^>]*>", r"\[\[\s*max_total_threads_per_threadgroup\(\d+\)\s*\]\]",
    r"\[\[\s*thread_position_in_\w+\s*\]\]",
)


@functools.cache
def compiler() -> str | None:
    """Return the path of a clang that is new enough, or None."""
    for path in filter(None, map(shutil.which, NAMES)):
        text = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60, check=False).stdout
        version = re.search(r"clang version (\d+)", text)
        if "Apple" not in text and version is not None and int(version[1]) >= OLDEST:
            return path
    return None


def refusal(metal: str) -> str:
    """Return what clang says against a Metal source, or nothing if it takes it."""
    path = compiler()
    assert path is not None
    for pattern in REMOVED:
        metal = re.sub(pattern, "", metal)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.clcpp"
        source.write_text(f'#define __METAL_VERSION__ {METAL_VERSION}\n#include "{SHIM}"\n{metal}')
        done = subprocess.run([path, *FLAGS, str(source)], capture_output=True, text=True, timeout=120, check=False)
    return done.stderr if done.returncode else ""
