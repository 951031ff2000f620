"""Show results of the suites on the terminal, and in RESULTS.md with a plot for each suite."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks import plots
from benchmarks.curves import Panel
from benchmarks.quality.report import check_plots, table
from benchmarks.suites import SUITES, Part, Row, on

FOLDER = Path(__file__).parent / "results"
REPORT = Path(__file__).parent / "RESULTS.md"
HEAD = ("what", "ours", "spread", "to the floor", "best peer", "ratio")
INTRODUCTION = """\
# Results

Medians of alternating turns in one process. The results of every contender are first compared with the float64
recurrence. Lower ratios are better. *Spread* is half the distance between the quartiles over the median. *The floor* is
the longer of two times: that of moving the necessary bytes at the rate at which this machine copies, and that of the
matrix products at the rate at which it multiplies square matrices. An mLSTM on CUDA is timed by device events, while
other work keeps the device busy until the call is submitted; *called* is the wall time of a step with its submission.
`python -m benchmarks.run` measures and writes this file; `python -m benchmarks.quotes` writes it from `results/`."""

Kept = Mapping[str, Any]


def keep(found: Kept) -> None:
    """Write one suite's result to the folder of the report."""
    FOLDER.mkdir(exist_ok=True)
    _place(found).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def stored(suite: str, device: str) -> Kept:
    """Return a suite's result; device: its type, and the label if the result has one, as "cuda.h200"."""
    found: Kept = json.loads((FOLDER / f"{suite}.{device}.json").read_text(encoding="utf-8"))
    return found


def show(found: Kept) -> None:
    """Print one suite's rows."""
    from rich.console import Console
    from rich.table import Table

    grid = Table(*HEAD, title=f"{found['suite']}, {found['device']}")
    for row in rows(found):
        grid.add_row(*_cells(row))
    console = Console()
    console.print(grid)
    for line in _absent(found):
        console.print(line, style="dim")


def write() -> None:
    """Write RESULTS.md and the plots from all stored results."""
    check_plots()
    lines = [INTRODUCTION]
    for path in sorted(FOLDER.glob("*.json"), key=lambda path: [*SUITES].index(path.stem.split(".")[0])):
        found = json.loads(path.read_text(encoding="utf-8"))
        measured = [part["result"] for part in found["parts"] if "result" in part]
        about = {key: value for result in measured for key, value in result["machine"].items()}
        machine = ", ".join(f"{key} {value}" for key, value in about.items())
        lines += ["", f"## {', '.join(filter(None, [found['suite'], found['device'], found.get('label')]))}", ""]
        lines += [f"{machine}; {found['date']}, commit {found['commit']}.", ""]
        lines += table(HEAD, [_cells(row) for row in rows(found)])
        title = f"{found['suite']}, {about.get('name', found['device'])}, {found['date']}, commit {found['commit']}"
        bars, panels = [row for row in rows(found, bars=True) if row.ratio is not None], [*_panels(found)]
        if plots.suite(path.with_suffix(".png"), title, bars, panels):
            shown = [*(panel.y for panel in panels), *(["times beside the best other package"] if bars else [])]
            lines += ["", f"![{', '.join(shown)}](results/{path.stem}.png)"]
        lines += ["", *(f"- {line}" for line in _absent(found))]
    REPORT.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def _place(found: Kept) -> Path:
    return FOLDER / ".".join([found["suite"], found["device"], *([found["label"]] if "label" in found else []), "json"])


def rows(found: Kept, *, bars: bool = False) -> Iterator[Row]:
    """Yield the table rows of a stored result; bars: those alone that its plot has."""
    for part, result in _measured(found):
        if part.bars or not bars:
            yield from part.rows(result)


def _panels(found: Kept) -> Iterator[Panel]:
    """Yield the lines of a stored result's plot."""
    for part, result in _measured(found):
        yield from part.lines(result)


def _measured(found: Kept) -> Iterator[tuple[Part, Kept]]:
    """Yield the parts of a stored result that were measured, and what they found; later parts may be newer than it."""
    for part, kept in zip(on(found["suite"], found["device"]), found["parts"], strict=False):
        if "result" in kept:
            yield part, kept["result"]


def _cells(row: Row) -> list[str]:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    return [row.what, row.ours, number(row.spread, ".1%"), number(row.to_floor, ".2f"), row.peer,
            number(row.ratio, ".3f")]


def _absent(found: Kept) -> list[str]:
    """Return who was excluded, grouped by reason."""
    reasons = {f"{name}: {why}": None for row in rows(found) for name, why in row.no_part.items()}
    errors = [f"{part['module']}: {part['error']}" for part in found["parts"] if "error" in part]
    return [*errors, *reasons]
