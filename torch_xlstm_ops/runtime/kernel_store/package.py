"""One kept function: a folder with the kernels' files, and a manifest that says what they are and has their hashes.

The folder is written under a hidden name and then renamed, so that it is whole or not there. The manifest's first line
is the SHA-256 of the rest, a JSON object.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from torch_xlstm_ops.runtime import bounded_read, torch_internals
from torch_xlstm_ops.runtime.files import PARTIAL
from torch_xlstm_ops.runtime.kernel_store import trust

MANIFEST = "manifest"
MAX_MANIFEST, MAX_KERNEL = 4 << 20, 64 << 20  # bytes


class Damaged(ValueError):
    """A package is not as it was written; the message says what is wrong."""


class Package(NamedTuple):
    """What a manifest says."""

    properties: Mapping[str, str]
    compiler: str | None  # None: imported, and used whatever compiler is here
    source: str  # Python, defines `call`
    conditions: str  # a Python expression of the free axes' names
    # By the name in `source`: file, sha256, module, function; for a GPU device (its index) and shared (bytes) too.
    kernels: Mapping[str, Mapping[str, Any]]


def write(folder: Path, package: Package, contents: Mapping[str, bytes]) -> bool:
    """Write a package as `folder`, with the contents of its files by name; return False if another process was first.

    Raises OSError if it cannot be written.
    """
    partial = folder.parent / f".{folder.name}.{os.urandom(8).hex()}{PARTIAL}"
    os.mkdir(partial, 0o700)
    try:
        for name, content in {**contents, MANIFEST: _sealed(package)}.items():
            handle = os.open(partial / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(handle, "wb") as file:
                file.write(content)
        try:
            os.rename(partial, folder)
        except OSError:
            if not folder.is_dir():
                raise
            return False
        return True
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sealed(package: Package) -> bytes:
    body = json.dumps(package._asdict(), sort_keys=True).encode()
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def remove(folder: Path) -> None:
    """Remove a package: first its name, then its files."""
    gone = folder.parent / f".{folder.name}.{os.urandom(8).hex()}{PARTIAL}"
    with suppress(FileNotFoundError):
        os.rename(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)


def parse(content: bytes) -> Package:
    """Return what a manifest's bytes say. Raises Damaged."""
    seal, _, body = content.partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != seal:
        raise Damaged("its manifest has another hash")
    try:
        found = Package(**bounded_read.parse_json(body))
        for kernel in found.kernels.values():
            kernel["file"], kernel["sha256"], kernel["module"], kernel["function"]
            if {type(value) for value in _on_gpu(kernel).values()} - {int}:
                raise TypeError(f"{kernel['function']} must have whole numbers")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Damaged(f"its manifest cannot be read: {error}") from error
    return found


def _on_gpu(kernel: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"device": kernel["device"], "shared": kernel["shared"]} if "device" in kernel else {}


def read(folder: Path) -> Package:
    """Return a package's manifest. Raises Damaged, trust.Untrusted, and OSError if there is none."""
    trust.check(folder)
    try:
        return parse(_content(folder / MANIFEST, MAX_MANIFEST))
    except FileNotFoundError as error:
        if not folder.is_dir():
            raise
        raise Damaged("it has no manifest") from error


def check_kernels(folder: Path, package: Package) -> dict[str, bytes]:
    """Return the contents of a package's files by name, after comparing their hashes. Raises as `read` does."""
    found = {}
    for kernel in package.kernels.values():
        name = kernel["file"]
        if Path(name).name != name:
            raise Damaged(f"a file must be in the package's folder, got {name}")
        with suppress(FileNotFoundError):
            found[name] = _content(folder / name, MAX_KERNEL)
    compare(package, found)
    return found


def compare(package: Package, contents: Mapping[str, bytes]) -> None:
    """Raise Damaged unless the contents of files, by name, are those of the manifest."""
    for kernel in package.kernels.values():
        content = contents.get(kernel["file"])
        if content is None:
            raise Damaged(f"it has no {kernel['file']}")
        if hashlib.sha256(content).hexdigest() != kernel["sha256"]:
            raise Damaged(f"its file {kernel['file']} has another hash")


def _content(path: Path, most: int) -> bytes:
    trust.check(path)
    try:
        return bounded_read.read_bytes(path, most, follow_links=False)
    except ValueError as error:
        raise Damaged(f"its file {path.name} is {error}") from error


def load(folder: Path, package: Package) -> torch_internals.Raw | None:
    """Return the callable of a package that `check_kernels` accepted. Raises Damaged if a kernel cannot be loaded."""
    kernels = {
        name: torch_internals.Kernel(str(folder / kernel["file"]), kernel["module"], kernel["function"],
                                     **_on_gpu(kernel))
        for name, kernel in package.kernels.items()
    }
    generated = torch_internals.Generated(package.source, kernels)
    try:
        return torch_internals.put_together(generated, f"xlstm_ops_kernel_{folder.name}")
    except (ImportError, SyntaxError, NameError, RuntimeError) as error:
        raise Damaged(f"it cannot be loaded: {error}") from error


def pack(generated: torch_internals.Generated, properties: Mapping[str, str], compiler: str | None, conditions: str
         ) -> tuple[Package, dict[str, bytes]]:
    """Return the package of a compiled function, and the contents of its files. Raises OSError, ValueError."""
    contents: dict[str, bytes] = {}
    kernels: dict[str, Any] = {}
    for at, (name, kernel) in enumerate(generated.kernels.items()):
        content = bounded_read.read_bytes(kernel.path, MAX_KERNEL)
        on_gpu = {} if kernel.device is None else {"device": kernel.device, "shared": kernel.shared}
        file = f"{at}.cubin" if on_gpu else f"{at}.so"
        contents[file] = content
        kernels[name] = {"file": file, "sha256": hashlib.sha256(content).hexdigest(), "module": kernel.module,
                         "function": kernel.function, **on_gpu}
    return Package(properties, compiler, generated.source, conditions, kernels), contents
