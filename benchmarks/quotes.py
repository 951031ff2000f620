"""The tables of measured figures in the documents, each written from stored results.

    python -m benchmarks.quotes          # every table between its marks, RESULTS.md, QUALITY.md, and every plot
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

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


def _read(name: str) -> Any:
    """Return a stored result that no suite writes."""
    return json.loads((results.FOLDER / name).read_text(encoding="utf-8"))


def workers() -> str:
    """Return the tables of a prompt read by workers on GPUs, one for each number of them."""
    return "\n".join(_workers(count, _read(f"workers/{count}-h200.json")) for count in (2, 4))


def _workers(count: int, found: Mapping[str, Any]) -> str:
    rows = []
    for case in found["rows"]:
        if case["phase"] != "speed":
            continue
        seconds, speedup = case["seconds"], case["speedup"]
        rows.append((f"{case['tokens']:,}", f"{seconds['one process']:.3f} s", *(
            f"{seconds[way]:.3f} s, {speedup[way]:.2f} times as fast" for way in (f"{count} device", f"{count} host")
        )))
    head = ("tokens", "one process", f"{count} workers, GPU to GPU", f"{count} workers, through the host")
    machine = found["machine"]
    about = (f"{found['device']}; {found['date']}, commit {found['commit']}, torch {machine['torch'].split('+')[0]}, "
             f"Ray {machine['ray']}; {found['shape']['layers']} layers as xLSTM-7B's, {found['shape']['dtype']}.\n\n")
    return about + "\n".join(table(head, rows)) + "\n"


def online() -> str:
    """Return the table of the time that each policy of the online controller loses in the replay."""
    found = _read("replay/online.json")
    rows = [(row["scenario"], *(f"{part:.1%}" for part in row["lost"].values())) for row in found["rows"]]
    rows.append(("mean", *(f"{part:.1%}" for part in found["mean"].values())))
    names = {"default": "no tuning", "offline": "offline winner"}
    head = ("scenario", *(names.get(name, name) for name in found["mean"]))
    about = (f"{found['calls']:,} calls a scenario, {found['seeds']} seeds; {found['date']}, commit {found['commit']}. "
             f"The least loss of a policy on average: {found['winner']}.\n\n")
    return about + "\n".join(table(head, rows)) + "\n"


def overhead() -> str:
    """Return the table of what the online controller adds to a call."""
    found = _read("replay/overhead.cpu.json")
    names = {"off": "no tuning", "trying": "a new controller, trying plans", "settled": "a settled controller"}
    rows = [(name, f"{found['us_a_call'][state]:.1f} us", f"{found['spread'][state]:.1%}",
             f"{found['trials'][state]:.1%}" if state in found["trials"] else "") for state, name in names.items()]
    B, NH, S, DHQK, DHHV = found["shape"].values()
    about = (f"{_measured(found, found['machine'])}; a prompt of {S} tokens, ({B}, {NH}, {DHQK}, {DHHV}): medians of "
             f"{found['rounds']} batches of {found['calls']} calls.\n\n")
    return about + "\n".join(table(("state", "a call", "spread", "calls that tried another plan"), rows)) + "\n"


def _measured(found: results.Kept, machine: Mapping[str, Any]) -> str:
    """Return the device, date and commit of a result of the CPU."""
    threads = machine["threads"]
    return (f"CPU, {threads} thread{'s' * (threads != 1)}; {found['date']}, commit {found['commit'].split(';')[0]}, "
            f"torch {machine['torch'].split('+')[0]}")


def drop_ins() -> str:
    """Return the table of a model of each package, unpatched, with the package's own compile option, and patched."""
    found = results.stored("drop_ins", "cpu")
    cases = found["parts"][0]["result"]
    rows = []
    for name, case in cases.items():
        if "ratio" in case:
            ms = {mode: f"{value:,.1f} ms" for mode, value in case["ms"].items()}
            rows.append((name, ms["theirs"], ms.get("compiled", ""), ms["patched"], f"{case['ratio']['patched']:.2f}"))
    about = (f"{_measured(found, cases['machine'])}. The ratio is that of patched to unpatched time; "
             "lower is better.\n\n")
    head = ("model", "unpatched", "with the package's compile option", "patched", "ratio")
    return about + "\n".join(table(head, rows)) + "\n"


QUOTES = (
    Quote(DOCS / "patching.md", "drop_ins", drop_ins),
    Quote(DOCS / "tuning.md", "online", online),
    Quote(DOCS / "tuning.md", "overhead", overhead),
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
