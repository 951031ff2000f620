"""The processes of this machine, as Linux shows them."""

from __future__ import annotations

from pathlib import Path


def marked(mark: str) -> list[int]:
    """Return the processes whose environment holds a mark."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:  # gone, or not ours
            continue
    return found
