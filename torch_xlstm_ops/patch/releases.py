"""Installed releases of the upstream packages, compared with those that we tested."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
from typing import NamedTuple

from torch_xlstm_ops.patch import upstream


class Found(NamedTuple):
    """The installed release of a package."""

    version: str | None  # None if no installed distribution has the package
    distribution: str | None  # its pip name

    def __str__(self) -> str:
        return self.version or "of unknown version"


def import_name(name: str) -> str:
    """Return the import name of a package of the table, given that or a pip name of it or of an installed fork.

    Raises ValueError for another name.
    """
    by_any_name = {package.distribution: name for name, package in upstream.PACKAGES.items()}
    by_any_name |= {name: name for name in upstream.PACKAGES}
    if name in by_any_name:
        return by_any_name[name]
    providers = importlib.metadata.packages_distributions()
    for package in upstream.PACKAGES:
        if _normalised(name) in map(_normalised, providers.get(package, ())):
            return package
    raise ValueError(f"a package to patch must be one of {', '.join(upstream.PACKAGES)}, got {name!r}")


def _normalised(distribution: str) -> str:
    """Return a pip name as pip compares it."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def installed(name: str) -> bool:
    """Return whether a package of the table can be imported."""
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # half-imported: the module has no spec
        return name in sys.modules


def found(name: str) -> Found:
    """Return the installed release of a package, whichever distribution it comes from."""
    known = upstream.PACKAGES[name].distribution
    try:
        return Found(importlib.metadata.version(known), known)
    except importlib.metadata.PackageNotFoundError:
        others = importlib.metadata.packages_distributions().get(name)
        return Found(importlib.metadata.version(others[0]), others[0]) if others else Found(None, None)


def is_tested(name: str) -> bool:
    """Return whether the installed release of a package is one that we tested; a fork is not.

    Raises ImportError if it is missing, RuntimeError if it is too old.
    """
    package = upstream.PACKAGES[name]
    if not installed(name):
        raise ImportError(f"{name} is not installed: pip install '{package.requirement}'")
    version, distribution = found(name)
    numbers = re.match(r"(\d+)\.(\d+)", version or "")
    if distribution != package.distribution or numbers is None:
        return False
    release = int(numbers[1]), int(numbers[2])
    if release < package.minimum:
        raise RuntimeError(f"{name} must be {package.requirement}, got {version}: pip install '{package.requirement}'")
    return release <= package.newest
