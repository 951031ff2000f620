"""The plots of the report, one file a part and device, in the style of the suites' plots."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import plots
from benchmarks.quality.contenders import THEIRS

FEWEST = 30  # answers; shares of fewer are not shown
LEAST = 1e-9  # nats; a difference of 0 is drawn at this value
# The colours of a model's ways as in `_shown`; the last is the package's own.
MODELS = ((plots.OURS, plots.OTHERS[4], plots.OTHERS[0]), (plots.OTHERS[1], plots.OTHERS[3], plots.OTHERS[0]))


def mqar(result: Mapping[str, Any], axes: Sequence[Any]) -> None:
    """Plot accuracy by pairs, and by distance for the row lengths with errors."""
    by_pairs, by_distance = axes
    distances: set[int] = set()
    for model, marker, shades in zip(result["models"], "os", MODELS, strict=False):
        found = result["models"][model]
        for way, width, color in zip(_shown(found["accuracy"]), plots.WIDTHS, shades, strict=False):
            accuracy = found["accuracy"][way]
            by_pairs.plot([int(P) for P in accuracy], list(accuracy.values()), color=color, linewidth=width,
                          marker=marker, markersize=4, label=f"{model}, {way}")
        for P, style in zip(list(found["by_distance"])[-3:], ("-", "--", ":"), strict=False):
            buckets = {name: of for name, of in found["by_distance"][P].items() if of["answers"] >= FEWEST}
            by_distance.plot([int(name.split()[0]) for name in buckets],
                             [bucket["accuracy"] for bucket in buckets.values()], style, color=shades[0],
                             marker=marker, markersize=4, label=f"{model}, {P} pairs")
            distances.update(int(name.split()[0]) for name in buckets)
    trained = max(found["trained_pairs"] for found in result["models"].values())
    by_pairs.axvline(trained, color="0.7", linewidth=1, zorder=0)
    by_pairs.set(xlabel=f"pairs in a row (trained on up to {trained})", ylabel="share of right answers", ylim=(0, 1.03))
    by_distance.set(xlabel="tokens from pair to query, at least", ylabel="share of right answers", ylim=(0, 1.03))
    plots.powers_of_two(by_pairs, [int(P) for P in accuracy])
    plots.powers_of_two(by_distance, sorted(distances))


def _shown(ways: Mapping[str, Any]) -> list[str]:
    """Return the ways to plot: the reference, bfloat16, and transformers' own code, if they were run."""
    return [next(iter(ways)), *(name for name in ("bfloat16", THEIRS) if name in ways)]


def _style(name: str, color: str) -> dict[str, str]:
    """Return the style of a contender's line: transformers' own code is grey and dashed."""
    return {"color": plots.OTHERS[0], "linestyle": "--"} if name.startswith(THEIRS) else {"color": color}


def perplexity(result: Mapping[str, Any], axes: Sequence[Any]) -> None:
    """Plot nats by position, and every run's difference from the reference."""
    curve, distance = axes
    ends, runs = result["edges"], result["runs"]
    reference = next(iter(runs.values()))["nats"]
    for name, width, color in zip(_shown(runs), plots.WIDTHS, MODELS[0], strict=False):
        curve.plot(ends, runs[name]["nats"], color=color, linewidth=width, marker="o", markersize=4, label=name)
    for (name, run), color in zip(list(runs.items())[1:], itertools.cycle(plots.OTHERS[1:]), strict=False):
        gaps = [max(LEAST, abs(a - b)) for a, b in zip(run["nats"], reference, strict=True)]
        distance.plot(ends, gaps, marker=".", label=name, **_style(name, color))
    distance.axhline(1e-4, color="0.7", linewidth=1, zorder=0)
    distance.axhline(1e-2, color="0.7", linewidth=1, zorder=0)
    curve.set(xlabel="position in the text, up to", ylabel="nats a byte", ylim=(0, None))
    distance.set(xlabel="position in the text, up to", ylabel=f"nats from the reference ({LEAST:g}: none)",
                 yscale="log")
    for axis in axes:
        plots.powers_of_two(axis, ends)


def throughput(result: Mapping[str, Any], axes: Sequence[Any]) -> None:
    """Plot the rate of prefill, and the time to the first token."""
    lengths = [int(length) for length in result["lengths"]]
    colors = (plots.OURS, *plots.OTHERS[1:])  # the first is the default schedule
    for name, color in zip(next(iter(result["lengths"].values())), itertools.cycle(colors), strict=False):
        rows = [by_name[name] for by_name in result["lengths"].values()]
        style = {"marker": "o", "markersize": 4, "label": name, **_style(name, color)}
        axes[0].plot(lengths, [row["prefill_tok_s"] for row in rows], **style)
        axes[1].plot(lengths, [row["first_token_ms"] / 1e3 for row in rows], **style)
    axes[0].set(xlabel="tokens of the prompt", ylabel="tokens a second, prefill", ylim=(0, None))
    axes[0].yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes[1].set(xlabel="tokens of the prompt", ylabel="seconds to the first token", yscale="log")
    for axis in axes:
        plots.powers_of_two(axis, lengths)


DRAW: Mapping[str, Callable[[Mapping[str, Any], Sequence[Any]], None]] = {
    "mqar": mqar, "perplexity": perplexity, "throughput": throughput,
}


def draw(part: str, title: str, result: Mapping[str, Any], path: Path) -> None:
    """Write the plot of one part's result. Raises KeyError for a part without one."""
    picture = plots.figure(7.5)
    axes = picture.subplots(2, 1)
    DRAW[part](result, axes)
    for axis in axes:
        plots.beside(axis)
    plots.finish(picture, title, path)
