"""What Linux says of the processor."""

from __future__ import annotations

from collections.abc import Mapping

_MOST = 16384  # characters: the first processor's part is a few thousand


def facts() -> Mapping[str, str]:
    """Return the lines of /proc/cpuinfo for the first processor, by name; nothing on other systems."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            first = file.read(_MOST).split("\n\n")[0]
    except OSError:
        return {}
    parts = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in parts}
