"""The recording of the whole process that the `trace` setting asks for, and its file."""

from __future__ import annotations

import atexit
import os
from typing import NamedTuple

from torch_xlstm_ops import config
from torch_xlstm_ops.runtime import files
from torch_xlstm_ops.runtime.state import on_reset
from torch_xlstm_ops.trace.recording import Recording
from torch_xlstm_ops.trace.spans import start, stop


class _Process(NamedTuple):
    """The recording, its file, and the process that began it."""

    path: str
    recording: Recording
    pid: int


_process: _Process | None = None


def _follow(loaded: config.Config) -> None:
    """Start or stop the recording of the process as the configuration says."""
    global _process
    if loaded.trace == (_process.path if _process is not None else None):
        return
    if loaded.trace is not None:
        files.check_file("trace", loaded.trace)
    finish()
    if loaded.trace is not None:
        _process = _Process(loaded.trace, Recording(), os.getpid())
        start(_process.recording)


def finish() -> Recording | None:
    """End the recording that the `trace` setting began, write its file, and return it; None if there is none.

    An empty recording writes nothing: a run that failed early keeps an older file.
    """
    global _process
    if _process is None:
        return None
    (path, recording, pid), _process = _process, None
    stop(recording)
    if pid == os.getpid() and recording.entries():  # the parent of a forked child writes the file
        recording.write(path)
    return recording


config.on_load(_follow)
on_reset(finish)
atexit.register(finish)
