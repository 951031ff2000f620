"""Patch packages when a program imports them, and import none.

    watch = patch_on_import()           # or patch_on_import("tirex", "xlstm")

`XLSTM_OPS_PATCH` does this when torch_xlstm_ops is imported: ``auto`` for every package of the table, or names
separated by commas. ``xlstm-ops run`` does it for a script that does not import us. A package that cannot be patched
is skipped with a warning, so that the program still runs.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from functools import partial

from torch_xlstm_ops.config import PATCH_VARIABLE
from torch_xlstm_ops.patch import releases, upstream
from torch_xlstm_ops.patch.handle import Handle, patch
from torch_xlstm_ops.runtime.import_hook import when_imported


def patch_on_import(*names: str, compat: bool = False) -> Watch:
    """Patch the named packages, default all of the table, now if they are imported, else after their import.

    compat: as for `patch`. Raises ValueError for an unknown name.
    """
    return Watch(list(dict.fromkeys(map(releases.import_name, names))) or list(upstream.PACKAGES), compat)


def patch_from_environment() -> Watch | None:
    """Patch the packages that `XLSTM_OPS_PATCH` names, if any. Raises ValueError for an unknown name."""
    value = os.environ.get(PATCH_VARIABLE, "").strip()
    if not value:
        return None
    try:
        return patch_on_import(*([] if value == "auto" else [name.strip() for name in value.split(",")]))
    except ValueError:
        expected = f"auto or names of {', '.join(upstream.PACKAGES)}"
        raise ValueError(f"environment variable {PATCH_VARIABLE} must be {expected}, got {value!r}") from None


class Watch:
    """Patches packages after their import, and holds the handles."""

    def __init__(self, names: Sequence[str], compat: bool) -> None:
        self._compat = compat
        self._handles: list[Handle] = []
        self._cancel = [when_imported(upstream.PACKAGES[name].trigger_module, partial(self._patch, name))
                        for name in names]

    def report(self) -> tuple[str, ...]:
        """Return the lines of every package patched so far."""
        return tuple(dict.fromkeys(line for handle in self._handles for line in handle.report()))

    def remove(self) -> None:
        """Wait for no more imports, and remove the patches. Raises as `Handle.remove`."""
        for cancel in self._cancel:
            cancel()
        for handle in self._handles:
            handle.remove()

    def _patch(self, name: str) -> None:
        """Patch a package that was imported, or warn why it cannot be patched."""
        try:
            self._handles.append(patch(name, compat=self._compat))
        except (ImportError, RuntimeError) as error:
            warnings.warn(f"{name} is not patched: {error}", RuntimeWarning, stacklevel=2)
