"""The plots of the report, one file a part and device; matplotlib is imported where it is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.contenders import THEIRS

FEWEST = 30  # answers; shares of fewer are not shown
LEAST = 1e-9  # nats; a difference of 0 is drawn at this value


def mqar(result: Mapping[str, Any], axes: Sequence[Any]) -> None:
    """Plot accuracy by pairs, and by distance for the row lengths with errors."""
    by_pairs, by_distance = axes
    for model, marker in zip(result["models"], "os", strict=False):
        found = result["models"][model]
        for way, style in zip(_shown(found["accuracy"]), ("-", "--", ":"), strict=False):
            accuracy = found["accuracy"][way]
            by_pairs.plot([int(P) for P in accuracy], list(accuracy.values()), style, marker=marker, markersize=4,
                          label=f"{model}, {way}")
        for P in list(found["by_distance"])[-3:]:
            buckets = {name: of for name, of in found["by_distance"][P].items() if of["answers"] >= FEWEST}
            by_distance.plot([int(name.split()[0]) for name in buckets],
                             [bucket["accuracy"] for bucket in buckets.values()], marker=marker, markersize=4,
                             label=f"{model}, {P} pairs")
    trained = max(found["trained_pairs"] for found in result["models"].values())
    by_pairs.axvline(trained, color="0.7", linewidth=1, zorder=0)
    by_pairs.set(xlabel=f"pairs in a row (trained on up to {trained})", ylabel="share of right answers", ylim=(0, 1.03))
    by_distance.set(xlabel="tokens from pair to query, at least", ylabel="share of right answers", ylim=(0, 1.03))
    _powers_of_two(by_pairs, [int(P) for P in accuracy])
    by_distance.set_xscale("log", base=2)


def _shown(ways: Mapping[str, Any]) -> list[str]:
    """Return the ways to plot: the reference, bfloat16, and transformers' own code, if they were run."""
    return [next(iter(ways)), *(name for name in ("bfloat16", THEIRS) if name in ways)]


def perplexity(result: Mapping[str, Any], axes: Sequence[Any]) -> None:
    """Plot nats by position, and every run's difference from the reference."""
    curve, distance = axes
    ends, runs = result["edges"], result["runs"]
    reference = next(iter(runs.values()))["nats"]
    for name, style in zip(_shown(runs), ("-", "--", ":"), strict=False):
        curve.plot(ends, runs[name]["nats"], style, marker="o", markersize=4, label=name)
    for name, run in list(runs.items())[1:]:
        gaps = [max(LEAST, abs(a - b)) for a, b in zip(run["nats"], reference, strict=True)]
        distance.plot(ends, gaps, marker=".", label=name)
    distance.axhline(1e-4, color="0.7", linewidth=1, zorder=0)
    distance.axhline(1e-2, color="0.7", linewidth=1, zorder=0)
    curve.set(xlabel="position in the text, up to", ylabel="nats a byte", ylim=(0, None))
    distance.set(xlabel="position in the text, up to", ylabel=f"nats from the reference ({LEAST:g}: none)",
                 yscale="log")
    for axis in axes:
        _powers_of_two(axis, ends)


def throughput(result: Mapping[str, Any], axes: Sequence[Any]) -> None:
    """Plot the rate of prefill, and the time to the first token."""
    lengths = [int(length) for length in result["lengths"]]
    for name in next(iter(result["lengths"].values())):
        rows = [by_name[name] for by_name in result["lengths"].values()]
        style = "--" if name.startswith(THEIRS) else "-"
        axes[0].plot(lengths, [row["prefill_tok_s"] for row in rows], style, marker="o", label=name)
        axes[1].plot(lengths, [row["first_token_ms"] / 1e3 for row in rows], style, marker="o", label=name)
    axes[0].set(xlabel="tokens of the prompt", ylabel="tokens a second, prefill", ylim=(0, None))
    axes[1].set(xlabel="tokens of the prompt", ylabel="seconds to the first token", yscale="log")
    for axis in axes:
        _powers_of_two(axis, lengths)


DRAW: Mapping[str, Callable[[Mapping[str, Any], Sequence[Any]], None]] = {
    "mqar": mqar, "perplexity": perplexity, "throughput": throughput,
}


def draw(part: str, result: Mapping[str, Any], path: Path) -> None:
    """Write the plot of one part's result. Raises KeyError for a part without one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.5), layout="constrained")
    axes = figure.subplots(1, 2)
    DRAW[part](result, axes)
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _powers_of_two(axis: Any, ticks: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [f"{tick // 1024}K" if tick >= 1024 else str(tick) for tick in ticks])
