"""The line plots of the suites: which values of a stored result are drawn against what."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

Result = Mapping[str, Any]
OURS = "ours"
SMOOTHED = 10  # training steps in a mean of losses


class Line(NamedTuple):
    """One line of a panel."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    ours: bool = False


class Panel(NamedTuple):
    """One pair of axes; `ticks` places its own labels on the x axis."""

    x: str
    y: str
    lines: Sequence[Line]
    ticks: Sequence[str] = ()  # of x = 0, 1, ...
    powers: bool = False  # x: powers of two, on a log axis
    from_zero: bool = True  # the y axis begins at 0, unless its range calls for a log axis


def throughput(result: Result) -> Iterator[Panel]:
    """Yield tokens a second by prompt length: ours, and each other package at its best chunk size of each length."""
    groups: dict[str, dict[str, dict[int, float]]] = {}
    for case in result["cases"]:
        B, NH, DHQK, DHHV, S = case["shape"].values()
        rates = groups.setdefault(f"({B}, {NH}, {DHQK}, {DHHV}), {case['dtype']}", {})
        best = case["best_peer"]
        for name in (OURS, *case.get("ranked", [] if best is None else [best])):
            of = rates.setdefault(_package(name), {})
            of[S] = max(of.get(S, 0.0), B * S / case["ms"][name] * 1e3)
    for sizes, rates in groups.items():
        lines = [Line(name, [*of], [*of.values()], name == OURS) for name, of in rates.items()]
        if max(len(line.x) for line in lines) > 1:
            yield Panel(f"tokens of the prompt; (B, NH, DHQK, DHHV) = {sizes}", "tokens a second (higher is better)",
                        lines, powers=True)


def _package(name: str) -> str:
    """Return a contender's name without its chunk size."""
    package, _, size = name.rpartition(" ")
    return package if size.isdigit() else name


def waits(result: Result) -> Iterator[Panel]:
    """Yield the seconds of waiting for compilation so far, by the prompts in their order."""
    names = {"xlstm": "backend xlstm", "inductor": "Inductor alone"}
    lines = [
        Line(names[name], range(len(cases)), [*itertools.accumulate(max(0.0, case["wait_s"]) for case in cases)],
             name == "xlstm")
        for name, cases in result["cases"].items()
    ]
    yield Panel("tokens of each new prompt, in order", "seconds waited so far (lower is better)", lines,
                [f"{case['tokens']:,}" for case in result["cases"]["xlstm"]])


def losses(result: Result) -> Iterator[Panel]:
    """Yield the mean losses of a few training steps by step, with and without the drop-in."""
    lines = []
    for name, of in result["losses"].items():
        means = [sum(part) / len(part) for start in range(0, len(of), SMOOTHED)
                 if (part := of[start:start + SMOOTHED])]
        steps = [min(start + SMOOTHED, len(of)) for start in range(0, len(of), SMOOTHED)]
        lines.append(Line(name, steps, means, name == "patched"))
    model = result["model"]
    yield Panel(f"training step of {model['batch']} x {model['length']} tokens",
                f"bits a byte, mean of {SMOOTHED} steps", lines, from_zero=False)
