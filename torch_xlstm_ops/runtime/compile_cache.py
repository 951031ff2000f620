"""The folder where Inductor keeps what it compiled: a temporary one where its own cannot be written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch_xlstm_ops.runtime import environment
from torch_xlstm_ops.runtime.state import on_reset, warn_once

if TYPE_CHECKING:
    import tempfile

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
_temporary: list[tempfile.TemporaryDirectory[str]] = []  # at most one, deleted when the process exits


@on_reset
def _delete_temporary() -> None:
    while _temporary:
        _temporary.pop().cleanup()


def unwritable() -> OSError | None:
    """Return why the folder that TORCHINDUCTOR_CACHE_DIR names cannot be written, or None if it can.

    Call this before Inductor is imported: the import creates the folder, and cannot be repeated after an error.
    """
    folder = os.environ.get(VARIABLE)
    if folder:
        import tempfile

        try:
            os.makedirs(folder, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            return error
    return None


@contextmanager
def writable_folder(error: OSError | None) -> Iterator[None]:
    """Make Inductor write to a temporary folder of this process inside the block, unless `error` is None.

    error: why Inductor's own folder cannot be written.
    """
    if error is None:
        yield
        return
    if not _temporary:
        import tempfile

        _temporary.append(tempfile.TemporaryDirectory(prefix="xlstm-ops-inductor-", ignore_cleanup_errors=True))
    warn_once(f"Inductor's cache cannot be written ({error}): kernels are compiled in a temporary folder and not kept; "
              f"name a folder that can be written in {VARIABLE}")
    with environment.variable(VARIABLE, _temporary[0].name):
        yield
