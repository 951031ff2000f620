"""The pictures of the results: time and memory apart, ours in one colour, beside the best other package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.suites import Lines, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OURS, PEER = "#4477aa", "#bbbbbb"
_AXES = {"ms": "milliseconds", "s": "seconds of waiting at a first call", "MiB": "MiB held at once",
         "uJ": "microjoules a token"}
_LOG = 20  # a larger ratio of the extremes takes a log axis


def quantity(text: str) -> tuple[float, str]:
    """Return the number at the beginning of a cell, and its unit: milliseconds, seconds, MiB or microjoules."""
    number, unit = text.split(", ")[0].split()
    value = float(number)
    return (value / 1e3, "ms") if unit == "us" else (value, unit)


def suite(path: Path, title: str, rows: Sequence[Row]) -> bool:
    """Draw a suite's rows that have a peer, as grouped bars; return whether there are any."""
    units: dict[str, list[Row]] = {}
    for row in rows:
        if row.ratio is not None:
            units.setdefault(quantity(row.ours)[1], []).append(row)
    if not units:
        return False
    heights = [1.0 + 0.55 * len(group) for group in units.values()]
    figure = _figure(sum(heights))
    panels = figure.subplots(len(units), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (unit, group) in zip(panels, units.items(), strict=True):
        _bars(axis, unit, group)
    _finish(figure, title, path)
    return True


def lines(path: Path, title: str, drawn: Lines) -> None:
    """Draw curves, ours in the colour of all plots; the others are dashed, as equal ones lie over each other."""
    figure = _figure(4.5)
    axis = figure.subplots()
    for at, (name, points) in enumerate(drawn.curves.items()):
        color, style = ("0.4", "--") if at else (OURS, "-")
        axis.plot(*zip(*points, strict=True), style, color=color, label=name, marker="o" if len(points) < 20 else None)
    axis.set(xlabel=drawn.x, ylabel=drawn.y)
    if drawn.log:
        axis.set(xscale="log", yscale="log")
    for one in (axis.xaxis, axis.yaxis):
        one.set_major_formatter(lambda value, _: f"{value:,g}")
    axis.grid(color="0.9")
    axis.legend(frameon=False)
    _finish(figure, title, path)


def glance(path: Path, title: str, rows: Sequence[tuple[str, Row]]) -> None:
    """Draw the times of the best other package over ours, as factors; rows: their names and the rows."""
    figure = _figure(1.2 + 0.5 * len(rows))
    axis = figure.subplots()
    factors = [1 / row.ratio for _, row in rows if row.ratio]
    bars = axis.barh([name for name, _ in rows], factors, color=OURS)
    axis.bar_label(bars, labels=[f"{factor:.1f}x" for factor in factors], padding=3)
    axis.axvline(1, color="0.4", linewidth=1)
    axis.set(xlabel="times as fast as the best other package (higher is better)", xlim=(0, 1.1 * max(factors)))
    axis.invert_yaxis()
    _finish(figure, title, path)


def _bars(axis: Axes, unit: str, rows: Sequence[Row]) -> None:
    ours, peers = [quantity(row.ours)[0] for row in rows], [quantity(row.peer)[0] for row in rows]
    names = [row.peer.split(", ", 1)[1] for row in rows]
    queued = set(names) == {"inductor"}  # the suite that compares two of our schedules
    for values, shift, color, label, notes in (
        (ours, -0.2, OURS, "queued" if queued else "ours", [f"{row.ratio:.2f} of the other" for row in rows]),
        (peers, 0.2, PEER, "inductor" if queued else "best other package", names),
    ):
        bars = axis.barh([place + shift for place in range(len(rows))], values, 0.38, color=color, label=label)
        texts = [f"{_number(value)}  {note}" for value, note in zip(values, notes, strict=True)]
        axis.bar_label(bars, labels=texts, padding=3, fontsize=8)
    what = [row.what.removeprefix("memory that ").removesuffix(" holds at once") for row in rows]
    axis.set_yticks(range(len(rows)), what)
    low, high = min(*ours, *peers), max(*ours, *peers)
    if unit == "ms" and high / low > _LOG:
        axis.set(xscale="log", xlim=(low / 3, high * (high / low) ** 0.6 * 4), xlabel=f"{_AXES[unit]}, log scale "
                 "(lower is better)")
    else:
        axis.set(xlim=(0, 1.5 * high), xlabel=f"{_AXES[unit]} (lower is better)")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axis.invert_yaxis()
    axis.legend(loc="lower right", fontsize=8, frameon=False)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _figure(height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(10, max(2.5, height)), layout="constrained")


def _finish(figure: Any, title: str, path: Path) -> None:
    figure.suptitle(title, fontsize=11)
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    figure.savefig(path, dpi=110)
