"""The pictures of the results: time and memory apart, ours in one colour, beside other packages; bars and lines."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.curves import Panel
from benchmarks.suites import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OURS, PEER = "#4477aa", "#bbbbbb"
OTHERS = ("#777777", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bb8855", "#334455", "#aaaa77",
          "#ff9933")  # of lines; the first is that of a package's own code
WIDTHS = (4.0, 2.5, 1.5)  # of lines that may lie on each other, the widest first
_AXES = {"ms": "milliseconds", "s": "seconds of waiting at a first call", "MiB": "MiB held at once",
         "uJ": "microjoules a token"}
_LABEL = 58  # characters in a line of a label
_LOG = 20  # a larger ratio of the extremes takes a log axis


def quantity(text: str) -> tuple[float, str]:
    """Return the number at the beginning of a cell, and its unit: milliseconds, seconds, MiB or microjoules."""
    number, unit = text.split(", ")[0].split()[:2]
    value = float(number)
    return (value / 1e3, "ms") if unit == "us" else (value, unit)


def suite(path: Path, title: str, rows: Sequence[Row], lines: Sequence[Panel] = ()) -> bool:
    """Draw a suite's lines, and its rows that have a peer as grouped bars; return whether there are any."""
    groups: dict[tuple[str, tuple[str, str]], list[Row]] = {}
    for row in rows:
        if row.ratio is not None:
            groups.setdefault((quantity(row.ours)[1], row.sides), []).append(row)
    heights = [*(3.6 for _ in lines), *(1.0 + 0.55 * len(group) for group in groups.values())]
    if not heights:
        return False
    picture = figure(sum(heights))
    parts = picture.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    axes = [part.subplots() for part in parts]
    for axis, panel in zip(axes, lines, strict=False):
        _lines(axis, panel)
    for axis, ((unit, sides), group) in zip(axes[len(lines):], groups.items(), strict=True):
        _bars(axis, unit, sides, group)
    finish(picture, title, path)
    return True


def glance(path: Path, title: str, rows: Sequence[tuple[str, Row]]) -> None:
    """Draw the times of the best other package over ours, as factors; rows: their names and the rows."""
    picture = figure(1.2 + 0.5 * len(rows))
    axis = picture.subplots()
    factors = [1 / row.ratio for _, row in rows if row.ratio]
    bars = axis.barh([name for name, _ in rows], factors, color=OURS)
    axis.axvline(1, color="0.4", linewidth=1)
    axis.bar_label(bars, labels=[f"{factor:.1f}x" for factor in factors], padding=4,
                   bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
    axis.set(xlabel="times as fast as the best other package (higher is better)", xlim=(0, 1.1 * max(factors)))
    axis.invert_yaxis()
    finish(picture, title, path)


def _lines(axis: Axes, panel: Panel) -> None:
    """Draw the lines of a panel, ours on top."""
    others = iter(OTHERS)
    for line in panel.lines:
        style = {"color": OURS, "zorder": 3} if line.ours else {"color": next(others), "linestyle": "--"}
        axis.plot(line.x, line.y, marker="o", markersize=4, label=line.name, **style)
    values = [value for line in panel.lines for value in line.y]
    axis.set(xlabel=panel.x, ylabel=panel.y)
    if min(values) > 0 and max(values) / min(values) > _LOG:
        axis.set_yscale("log")
    elif panel.from_zero:
        axis.set_ylim(0, 1.1 * max(*values, 1e-9))
    if axis.get_yscale() != "log":
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    if panel.powers:
        powers_of_two(axis, sorted({int(x) for line in panel.lines for x in line.x}))
    if panel.ticks:
        axis.set_xticks(range(len(panel.ticks)), panel.ticks)
    beside(axis)


def powers_of_two(axis: Axes, ticks: Sequence[int]) -> None:
    """Give the x axis of numbers of tokens a log scale of base 2."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [f"{tick // 1024}K" if tick >= 1024 else str(tick) for tick in ticks])


def beside(axis: Axes) -> None:
    """Place the legend to the right of the axes, where it covers no value, and draw a grid."""
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _bars(axis: Axes, unit: str, sides: tuple[str, str], rows: Sequence[Row]) -> None:
    ours, peers = [quantity(row.ours)[0] for row in rows], [quantity(row.peer)[0] for row in rows]
    names = [row.peer.split(", ", 1)[1] for row in rows]
    for values, shift, color, label, notes in (
        (ours, -0.2, OURS, sides[0], [f"{row.ratio:.2f} of the other" for row in rows]),
        (peers, 0.2, PEER, sides[1], names),
    ):
        bars = axis.barh([place + shift for place in range(len(rows))], values, 0.38, color=color, label=label)
        texts = [f"{_number(value)}  {note}" for value, note in zip(values, notes, strict=True)]
        axis.bar_label(bars, labels=texts, padding=3, fontsize=8)
    what = [row.what.removeprefix("memory that ").removesuffix(" holds at once") for row in rows]
    axis.set_yticks(range(len(rows)), ["\n".join(textwrap.wrap(text, _LABEL)) for text in what])
    low, high = min(*ours, *peers), max(*ours, *peers)
    if unit == "ms" and high / low > _LOG:
        axis.set(xscale="log", xlim=(low / 3, high * (high / low) ** 0.6 * 4), xlabel=f"{_AXES[unit]}, log scale "
                 "(lower is better)")
    else:
        axis.set(xlim=(0, 1.6 * high), xlabel=f"{_AXES[unit]} (lower is better)")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axis.invert_yaxis()
    axis.legend(fontsize=8, frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1.0, 1.0))


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def figure(height: float) -> Any:
    """Return an empty figure of the one width; height: in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(10, max(2.5, height)), layout="constrained")


def finish(picture: Any, title: str, path: Path) -> None:
    """Give a figure its title and the one style, and write it."""
    picture.suptitle(title, fontsize=11)
    for axis in picture.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    picture.savefig(path, dpi=110, metadata={"Software": None})
