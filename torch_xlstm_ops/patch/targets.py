"""Choose the replacements for packages or a model, each checked against the installed release."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from typing import Protocol, cast

import torch

from torch_xlstm_ops.patch import releases, upstream
from torch_xlstm_ops.patch.replacements import Replacement, check
from torch_xlstm_ops.runtime.state import warn_once


class _DropIn(Protocol):
    def replacements(self, compat: bool) -> Sequence[Replacement]: ...


def of_all_installed(compat: bool) -> tuple[list[Replacement], list[str]]:
    """Return the replacements for every installed package, and a line for each that is left as it is and why.

    Warns of those that cannot be patched.

    Raises ImportError if none is installed, RuntimeError if none can be patched.
    """
    installed = list(filter(releases.installed, upstream.PACKAGES))
    if not installed:
        wanted = " or ".join(f"pip install '{package.requirement}'" for package in upstream.PACKAGES.values())
        raise ImportError(f"there is nothing to patch: {wanted}")
    found: list[Replacement] = []
    failures: list[Exception] = []
    left = [f"{name}: {why}" for name, why in upstream.OTHERS.items() if releases.installed(name)]
    for name in installed:
        try:
            these = _of_package(name, compat)
        except (ImportError, RuntimeError) as error:
            failures.append(error)
            left.append(f"{name}: not touched: {error}")
        else:
            found += these
            left += [] if these else [f"{name}: not touched with compat={compat}"]
    if not found:
        raise RuntimeError(f"nothing could be patched: {'; '.join(map(str, failures))}") from failures[0]
    for failure in failures:
        warnings.warn(f"not patched: {failure}", RuntimeWarning, stacklevel=3)
    return found, left


def of_model(model: torch.nn.Module, compat: bool) -> list[Replacement]:
    """Return the replacements in the classes of a model's layers. Raises ValueError if there are none."""
    imported = [name for name, package in upstream.PACKAGES.items() if package.trigger_module in sys.modules]
    types = {type(module) for module in model.modules()}
    found = [one for one in of_packages(imported, compat) if any(issubclass(t, one.layer_class) for t in types)]
    if not found:
        raise ValueError(f"a model to patch must have xLSTM layers of {', '.join(upstream.PACKAGES)}, got "
                         f"{type(model).__name__} without")
    return found


def of_packages(names: Sequence[str], compat: bool) -> list[Replacement]:
    """Return the replacements for packages, by import name. Raises ImportError, RuntimeError as `patch`."""
    found: list[Replacement] = []
    for name in names:
        found += _of_package(name, compat)
    return found


def _of_package(name: str, compat: bool) -> list[Replacement]:
    """Return the replacements for one package, each checked against the package.

    In a release that we tested, every check must pass. In another one, a replacement whose check fails is skipped with
    a warning.
    """
    package, tested = upstream.PACKAGES[name], releases.is_tested(name)
    try:
        found = cast(_DropIn, importlib.import_module(package.drop_in)).replacements(compat)
    except (ImportError, AttributeError) as error:
        raise RuntimeError(f"{name} differs from the releases that we know: {error}") from error
    passed, failed = [], []
    for replacement in found:
        try:
            check(replacement)
        except RuntimeError as error:
            if tested:
                raise
            failed.append(str(error))
        else:
            passed.append(replacement)
    if failed:
        _report_differences(failed, f"{name} {releases.found(name)}", package.tested, nothing_left=not passed)
    return passed


def _report_differences(failed: Sequence[str], package: str, tested: str, *, nothing_left: bool) -> None:
    """Warn once of the failed checks of an untested release. Raises RuntimeError if all failed."""
    differences = "; ".join(failed)
    if nothing_left:
        raise RuntimeError(f"{package} differs from {tested}, which we tested, and cannot be patched: {differences}")
    warn_once(f"{package} differs from {tested}, which we tested, and is not patched where it differs: {differences}",
              stacklevel=5)
