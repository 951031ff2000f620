"""Read files that other programs may have changed: regular files of a bounded size, JSON of a bounded depth.

A FIFO, a device, a file that is too large and JSON that is nested too deep raise ValueError: nothing blocks, exhausts
memory or overflows the stack.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

MAX_DEPTH = 32
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"|[][{}]')


def read_bytes(path: str | Path, max_bytes: int, *, follow_links: bool = True) -> bytes:
    """Return the content of a regular file.

    Raises ValueError for another kind of file and for more than `max_bytes`, OSError if it cannot be opened.
    """
    return _read(path, max_bytes, follow_links, whole=True)


def read_beginning(path: str | Path, count: int, *, follow_links: bool = True) -> bytes:
    """Return the first `count` bytes of a regular file, or all of a shorter one. Raises as `read_bytes` does."""
    return _read(path, count, follow_links, whole=False)


def _read(path: str | Path, max_bytes: int, follow_links: bool, *, whole: bool) -> bytes:
    if not follow_links and os.path.islink(path):
        raise ValueError("a link")
    # O_NONBLOCK: opening a FIFO that nobody writes to does not wait.
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
    if not follow_links:
        flags |= getattr(os, "O_NOFOLLOW", 0)
    handle = os.open(path, flags)
    about = os.fstat(handle)
    if not stat.S_ISREG(about.st_mode):
        os.close(handle)
        raise ValueError("not a regular file")
    with open(handle, "rb") as file:
        if whole and about.st_size > max_bytes:
            raise ValueError(f"{about.st_size} bytes, more than {max_bytes}")
        try:
            content = file.read(about.st_size + 1 if whole else max_bytes)
        except MemoryError:
            raise OSError(errno.ENOMEM, f"no memory for its {about.st_size} bytes", str(path)) from None
    if whole and len(content) != about.st_size:
        raise ValueError("its size changed while it was read")
    return content


def parse_json(content: bytes, max_depth: int = MAX_DEPTH) -> Any:
    """Return the value of a JSON text in UTF-8. Raises ValueError for bad JSON and for more than `max_depth` levels."""
    text, depth = content.decode("utf-8"), 0
    for found in _STRING_OR_BRACKET.finditer(text):
        depth += (found[0] in "[{") - (found[0] in "]}")
        if depth > max_depth:
            raise ValueError(f"JSON nested deeper than {max_depth} levels")
    return json.loads(text)
