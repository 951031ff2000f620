"""Compiles the emulator's C++ into a cache outside the source tree."""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
from pathlib import Path

import torch

HERE = Path(__file__).parent
NATIVE = sorted((HERE / "native").glob("*.[ch]*"))
METAL = sorted((HERE / "metal").glob("*.h"))
# c10/metal includes these from Apple's toolchain; prelude.h has already said everything.
APPLE_HEADERS = ("array", "atomic", "compute", "math", "simdgroup", "stdlib", "type_traits")
TIMEOUT_S = 300
EXTENSION_FLAGS = ("-std=c++20", "-O1", "-fPIC", "-shared")
# Metal rounds every operation to its type: no contraction to fma, no double constants, no wider _Float16.
KERNEL_FLAGS = (
    "-std=c++17", "-O1", "-fPIC", "-w", "-ffp-contract=off", "-fexcess-precision=16",
    "-fsingle-precision-constant", "-fno-strict-aliasing", "-fvisibility=hidden", "-fno-gnu-unique",
)


class BuildFailed(RuntimeError):
    """g++ refused a source; `stderr` says why."""

    def __init__(self, source: Path, stderr: str) -> None:
        super().__init__(f"g++ refused {source}:\n{stderr[:4000]}")
        self.stderr = stderr


@functools.cache
def cache_folder() -> Path:
    """Return the folder for what these sources, this torch and this g++ build."""
    compiler = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    key = hashlib.sha256(f"{compiler}{torch.__version__}{EXTENSION_FLAGS}{KERNEL_FLAGS}".encode())
    for path in (*NATIVE, *METAL):
        key.update(path.name.encode() + path.read_bytes())
    base = Path(os.environ.get("XLSTM_TEST_CACHE") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "torch_xlstm_ops" / "mps_emulator" / key.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@functools.cache
def extension() -> Path:
    """Return the device extension, built on first use."""
    library = cache_folder() / "device.so"
    if not library.exists():
        torch_folder = Path(torch.__file__).parent
        include = torch_folder / "include"
        abi = int(torch._C._GLIBCXX_USE_CXX11_ABI)
        sources = [str(path) for path in NATIVE if path.suffix == ".cpp"]
        _compile(library, HERE / "native", [
            *EXTENSION_FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={abi}", f"-I{include}",
            f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}", *sources,
            f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10",
        ])
    return library


def kernel_library(cpp: str) -> Path:
    """Return the shared library of one translated Metal source, built unless it is in the cache."""
    name = hashlib.sha256(cpp.encode()).hexdigest()[:20]
    folder = cache_folder() / "kernels"
    folder.mkdir(exist_ok=True)
    library = folder / f"{name}.so"
    if not library.exists():
        source = folder / f"{name}.cpp"
        source.write_text(cpp)
        prelude = _precompiled_prelude()
        _compile(library, source, [*KERNEL_FLAGS, "-shared", *_kernel_includes(prelude), str(source)])
    return library


@functools.cache
def _precompiled_prelude() -> Path:
    """Return a folder with the Metal headers, prelude.h compiled beforehand: a kernel then compiles twice as fast."""
    folder = cache_folder() / "metal"
    compiled = folder / "prelude.h.gch"
    if not compiled.exists():
        folder.mkdir(exist_ok=True)
        for path in METAL:
            (folder / path.name).write_bytes(path.read_bytes())
        for name in APPLE_HEADERS:
            (folder / f"metal_{name}").write_text("#pragma once\n")
        _compile(compiled, folder / "prelude.h", [*KERNEL_FLAGS, "-x", "c++-header", str(folder / "prelude.h")])
    return folder


def _kernel_includes(folder: Path) -> list[str]:
    return [f"-I{folder}", f"-I{Path(torch.__file__).parent / 'include'}"]


def _compile(output: Path, source: Path, arguments: list[str]) -> None:
    """Run g++ and move the result into place at once: another process never sees half a library."""
    partial = output.with_suffix(f".{os.getpid()}{output.suffix}")
    run = subprocess.run(["g++", *arguments, "-o", str(partial)], capture_output=True, text=True, timeout=TIMEOUT_S)
    if run.returncode:
        raise BuildFailed(source, run.stderr)
    partial.replace(output)
