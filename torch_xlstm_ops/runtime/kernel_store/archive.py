"""Packages in one file, for another machine of the same kind: a zip archive with a folder for each package."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch_xlstm_ops.runtime import files
from torch_xlstm_ops.runtime.kernel_store import identity, package, trust
from torch_xlstm_ops.runtime.kernel_store.package import Damaged, Package
from torch_xlstm_ops.runtime.kernel_store.store import Store

_NAME = re.compile(r"([0-9a-f]{40})/(manifest|[0-9]{1,4}\.(?:so|cubin))")


class Imported(NamedTuple):
    """What became of the packages of an archive."""

    added: int
    present: int  # in the store already
    unfit: Mapping[str, str]  # made for another machine or installation: the reason by key


def write(store: Store, path: Path) -> int:
    """Write all good packages of a store to a file, and return their number. Raises OSError."""
    count = 0
    with files.replacing(path, "wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry in store.entries():
            try:
                contents = store.contents(entry.key)
                manifest = (store.folder / entry.key / package.MANIFEST).read_bytes()
            except (Damaged, trust.Untrusted, OSError):
                continue  # `verify` reports it
            for name, content in {**contents, package.MANIFEST: manifest}.items():
                archive.writestr(f"{entry.key}/{name}", content)
            count += 1
    return count


def read(store: Store, path: Path) -> Imported:
    """Add the packages of a file that fit this machine and installation to a store.

    Raises Damaged for another file or a changed one, trust.Untrusted if others can write the file or the store, and
    OSError. Nothing is added if a package is damaged.
    """
    trust.check(path)
    found = _parse(path)
    added, present, unfit = 0, 0, {}
    for key, (kept, contents) in found.items():
        reason = difference(kept)
        if reason is not None:
            unfit[key] = reason
        elif store.add(key, kept._replace(compiler=None), contents):
            added += 1
        else:
            present += 1
    return Imported(added, present, unfit)


def difference(kept: Package) -> str | None:
    """Return in which property this machine or installation differs from a package's, or None."""
    for name, value in identity.here(identity.device_of(kept.properties)).items():
        if kept.properties.get(name) != value:
            return f"{name} must be {kept.properties.get(name)!r}, got {value!r} here"
    return None


def _parse(path: Path) -> dict[str, tuple[Package, dict[str, bytes]]]:
    try:
        with zipfile.ZipFile(path) as archive:
            parts = _contents(archive)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise Damaged(f"it is not an archive of kernels: {error}") from error
    found = {}
    for key, contents in parts.items():
        if package.MANIFEST not in contents:
            raise Damaged(f"its package {key} has no manifest")
        kept = package.parse(contents.pop(package.MANIFEST))
        package.compare(kept, contents)
        if identity.Request(kept.properties).key != key:
            raise Damaged(f"its package {key} has another name than its properties")
        found[key] = kept, contents
    return found


def _contents(archive: zipfile.ZipFile) -> dict[str, dict[str, bytes]]:
    found: dict[str, dict[str, bytes]] = {}
    for info in archive.infolist():
        match = _NAME.fullmatch(info.filename)
        if match is None or info.file_size > package.MAX_KERNEL:
            raise Damaged(f"it has {info.filename[:80]!r}, which is no part of a package")
        with archive.open(info) as file:
            content = file.read(package.MAX_KERNEL + 1)
        found.setdefault(match[1], {})[match[2]] = content
    return found
