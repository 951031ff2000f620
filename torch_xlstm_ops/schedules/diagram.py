"""The drawing of a plan's bands and segments, for `str(plan)`."""

from __future__ import annotations


def diagram(bands: int, segments: int, scan_width: int) -> list[str]:
    """Draw a line per band, with the segments' numbers: -> a state passed on, ~> a state computed from a summary."""
    row = ""
    for number in _abbreviated(range(segments), 8):
        arrow = "" if number == 0 else "~>" if isinstance(number, int) and number % scan_width else "->"
        row += f" {arrow} {number}" if arrow else f" {number}"
    lines = []
    for index in _abbreviated(range(bands), 8):
        name = f"band {index}" if isinstance(index, int) else index
        lines.append(f"{name:<8} {row}" if isinstance(index, int) else name)
    return lines


def _abbreviated(numbers: range, limit: int) -> list[int | str]:
    """Return the numbers, at most `limit` of them, with an ellipsis for the rest."""
    return list(numbers) if len(numbers) <= limit else [*numbers[: limit - 2], "...", numbers[-1]]
