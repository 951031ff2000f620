"""Patch packages when a program imports them, and none that it does not.

    watch = patch_on_import()           # or patch_on_import("tirex", "xlstm")

`XLSTM_OPS_PATCH` does this when torch_xlstm_ops is imported: ``auto`` for every package we know, or names with commas
between. ``xlstm-ops run`` does it for a script that does not import us. A package that cannot be patched is left as it
is, with a warning: the program must run all the same.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from functools import partial

from torch_xlstm_ops.patch import Handle, patch, upstream
from torch_xlstm_ops.runtime.import_hook import when_imported

VARIABLE = "XLSTM_OPS_PATCH"


def patch_on_import(*names: str, compat: bool = False) -> Watch:
    """Patch the named packages, default all that we know, at once where they are imported, else as soon as they are.

    compat: as of `patch`. Raises ValueError for a name we do not know.
    """
    return Watch(list(dict.fromkeys(map(upstream.row, names))) or list(upstream.PEERS), compat)


def patch_from_environment() -> Watch | None:
    """Do what `XLSTM_OPS_PATCH` says: nothing where it is not set or empty. Raises ValueError for an unknown name."""
    value = os.environ.get(VARIABLE, "").strip()
    if not value:
        return None
    try:
        return patch_on_import(*([] if value == "auto" else [name.strip() for name in value.split(",")]))
    except ValueError:
        expected = f"auto or names of {', '.join(upstream.PEERS)}"
        raise ValueError(f"environment variable {VARIABLE} must be {expected}, got {value!r}") from None


class Watch:
    """Waits for the imports after which packages can be patched, and holds what came of it."""

    def __init__(self, names: Sequence[str], compat: bool) -> None:
        self._compat = compat
        self._handles: list[Handle] = []
        self._calls_off = [when_imported(upstream.PEERS[name].seam, partial(self._met, name)) for name in names]

    def report(self) -> tuple[str, ...]:
        """Return the lines of every package patched so far."""
        return tuple(dict.fromkeys(line for handle in self._handles for line in handle.report()))

    def remove(self) -> None:
        """Watch no more, and put back what was replaced. Raises as `Handle.remove`."""
        for call_off in self._calls_off:
            call_off()
        for handle in self._handles:
            handle.remove()

    def _met(self, name: str) -> None:
        """Patch a package that has been imported, or warn why not."""
        try:
            self._handles.append(patch(name, compat=self._compat))
        except (ImportError, RuntimeError) as error:
            warnings.warn(f"{name} is left as it is: {error}", RuntimeWarning, stacklevel=2)
