"""The tables of measured figures in the documents, each written from stored results.

    python -m benchmarks.quotes          # every table between its marks, RESULTS.md, QUALITY.md, and every plot
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks import glance, results
from benchmarks.quality import report
from benchmarks.quality.report import table

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "torch_xlstm_ops/docs"


class Quote(NamedTuple):
    """A table in a document."""

    document: Path
    name: str  # in its marks
    lines: Callable[[], str]

    @property
    def text(self) -> str:
        """Return the table with its marks."""
        return f"<!-- {self.name}: python -m benchmarks.quotes -->\n{self.lines()}<!-- /{self.name} -->"


def workers() -> str:
    """Return the table of a prompt read by workers on GPUs."""
    found = json.loads((results.FOLDER / "workers/4-h200.json").read_text(encoding="utf-8"))
    rows = []
    for case in found["rows"]:
        if case["phase"] != "speed":
            continue
        seconds, speedup = case["seconds"], case["speedup"]
        rows.append((f"{case['tokens']:,}", f"{seconds['one process']:.3f} s", *(
            f"{seconds[way]:.3f} s, {speedup[way]:.2f} times as fast" for way in ("4 device", "4 host")
        )))
    head = ("tokens", "one process", "4 workers, GPU to GPU", "4 workers, through the host")
    machine = found["machine"]
    about = (f"{found['device']}; {found['date']}, commit {found['commit']}, torch {machine['torch'].split('+')[0]}, "
             f"Ray {machine['ray']}; {found['shape']['layers']} layers as xLSTM-7B's, {found['shape']['dtype']}.\n\n")
    return about + "\n".join(table(head, rows)) + "\n"


def online() -> str:
    """Return the table of the time that each policy of the online controller loses in the replay."""
    found = json.loads((results.FOLDER / "replay/online.json").read_text(encoding="utf-8"))
    rows = [(row["scenario"], *(f"{part:.1%}" for part in row["lost"].values())) for row in found["rows"]]
    rows.append(("mean", *(f"{part:.1%}" for part in found["mean"].values())))
    names = {"default": "no tuning", "offline": "offline winner"}
    head = ("scenario", *(names.get(name, name) for name in found["mean"]))
    about = (f"{found['calls']:,} calls a scenario, {found['seeds']} seeds; {found['date']}, commit {found['commit']}. "
             f"The least loss of a policy on average: {found['winner']}.\n\n")
    return about + "\n".join(table(head, rows)) + "\n"


QUOTES = (
    Quote(DOCS / "tuning.md", "online", online),
    Quote(ROOT / "csrc_free_README.md", "glance", glance.lines),
    Quote(DOCS / "parallel.md", "workers", workers),
)


def write() -> None:
    """Write every table, the reports of all stored results, and every plot."""
    for quote in QUOTES:
        whole = quote.document.read_text(encoding="utf-8")
        before, rest = whole.split(f"<!-- {quote.name}:")
        after = rest.split(f"<!-- /{quote.name} -->")[1]
        quote.document.write_text(before + quote.text + after, encoding="utf-8")
    glance.draw()
    results.write()
    report.rewrite(ROOT / "benchmarks", plots=True)


if __name__ == "__main__":
    write()
