"""The report: one Markdown file of every part's stored result, with plots as files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.quality import plots as drawing
from torch_xlstm_ops.runtime.extras import how_to_install

Result = Mapping[str, Any]
EXAMPLES = (0, 11)  # prompts whose texts are shown
INTRODUCTION = """\
# Quality

The same weights run with every schedule, token by token, in every dtype, and with the package's own code. This file
compares what the models recall, the loss that they have on unseen text at any length, the text that they write, and the
speed. `python -m benchmarks.quality` measures and writes this file, its plots, and the JSON in `quality/results/`. Name
one PART, or give `--quick`, to run less. *Ways* are the schedules, dtypes and code paths; the first one is the
reference."""


def check_plots() -> None:
    """Raise SystemExit where matplotlib is missing."""
    if find_spec("matplotlib") is None:
        raise SystemExit(f"plots need matplotlib: {how_to_install('plot')}, or give --no-plots")


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", "\\n") for cell in line) + " |"
            for line in lines]


def percent(share: float) -> str:
    return f"{100 * share:.2f}%"


def mqar(result: Result) -> list[str]:
    """Return the section on recall."""
    lines = [
        "Multi-query associative recall: a row has P pairs of a key and a value, then every key once more in any "
        "order; the model must answer each key with its value. `python -m benchmarks.train_mqar` trains the models on "
        "one CPU core, from a fixed seed, with our own backward. Chance is 1 in 256.",
    ]
    for model, found in result["models"].items():
        size = found["size"]
        heads = size["slstm_heads"]
        before = f"an sLSTM of {heads} heads" if heads else f"convolutions of {size['conv']} tokens"
        lines += [
            "", f"**{model}**: an mLSTM block with {before} before q and k; {found['parameters']:,} parameters, a "
            f"state of {size['NH']} x {size['DHQK']} x {size['DHHV']}, trained on up to {found['trained_pairs']} "
            "pairs. Right answers, by pairs in a row:", "",
            *table(["way", *found["answers"]], (
                [way, *map(percent, accuracy.values())] for way, accuracy in found["accuracy"].items())),
            *(f"\n{way} is left out: {why}." for way, why in found.get("left_out", {}).items()),
            "", "Number of answers, right or wrong, that differ from the first way's:", "",
            *table(["way", *(f"{P}, of {count:,}" for P, count in found["answers"].items())], (
                [way, *counts.values()] for way, counts in list(found["differing"].items())[1:])),
            "", "Right answers by distance, in tokens from the pair to its query, where there were "
            f"{drawing.FEWEST} or more:", "",
            *_distances(found["by_distance"]),
        ]
    return lines


def _distances(by_distance: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    shown = {
        P: {name: percent(bucket["accuracy"]) for name, bucket in of.items() if bucket["answers"] >= drawing.FEWEST}
        for P, of in by_distance.items()
    }
    ordered = sorted({name for of in shown.values() for name in of}, key=lambda name: int(name.split()[0]))
    return table(["distance", *(f"{P} pairs" for P in shown)], (
        [name, *(of.get(name, "") for of in shown.values())] for name in ordered))


def perplexity(result: Result) -> list[str]:
    """Return the section on perplexity against length."""
    runs, ends = result["runs"], result["edges"]
    starts = [0, *ends[:-1]]
    return [
        f"The embedded model reads {result['rows']} rows of {result['length']:,} bytes of standard-library files that "
        "it was not trained on, one file after another. Nats a byte, by position:", "",
        *table(["run", *(f"{start:,} to {end:,}" for start, end in zip(starts, ends, strict=True))], (
            [name, *(f"{nats:.4f}" for nats in run["nats"])] for name, run in runs.items())),
        "", "Distance from the first run, in nats a byte: the largest of a bucket's mean, that of the mean of all "
        "bytes, and the largest of a single byte:", "",
        *table(["run", "mean", "bucket", "whole", "one byte"], (
            [name, f"{run['mean']:.6f}", *(f"{run[key]:.1e}" for key in (
                "bucket_difference", "mean_difference", "token_difference"))] for name, run in runs.items())),
    ]


def coherence(result: Result) -> list[str]:
    """Return the section on coherence."""
    def row(name: str, found: Result) -> list[object]:
        first = min(found["parted"], key=lambda one: one["token"], default=None)
        widest = max(found["parted"], key=lambda one: one["margin"], default=None)
        return [name, f"{found['identical']} of {found['texts']}",
                "" if first is None else f"{first['token']} (prompt {first['prompt']})",
                "" if widest is None else f"{widest['margin']:.2g}"]

    judged = result["judged"]
    lines = [
        f"The embedded model continues {len(result['prompts'])} fixed beginnings of functions by {result['tokens']} "
        "bytes, greedily, as one batch. *Identical* texts are those of the first way, byte for byte. For the others, "
        "the table has the first byte that differs, and the largest lead in logits that the first way's byte had over "
        "the one written instead. *All read at once*: one prefill reads prompt and text, and must choose the same byte "
        "at every position.", "",
        *table(["way", "identical", "first difference", "largest lead"], (
            row(name, found) for name, found in result["greedy"].items())),
        "", f"In the first way's texts, the smallest lead of a chosen byte over the second one is "
        f"{result['smallest_margin']:.2g} logits. Drawn with fixed seeds (temperature {result['temperature']}, "
        f"top-p {result['top_p']}), identical: " + ", ".join(
            f"{name} {found['identical']} of {found['texts']}" for name, found in result["sampled"].items()) + ".", "",
        "Quality of the texts of this byte-level model of 3.9 M parameters: the share of different n-grams of words "
        "and signs, of lines that repeat an earlier line of their text, and of functions that `ast.parse` accepts. A "
        "function ends at the next line without indentation; one that has not ended is cut after its last whole line.",
        "",
        *table(["", "distinct-2", "distinct-3", "repeated lines", "parse", "ended", "ended and parse"], (
            [kind, *(percent(of[key]) for key in ("distinct_2", "distinct_3", "repeated_lines", "parse")),
             of["ended"], of["ended_and_parse"]] for kind, of in judged.items())),
    ]
    for index in EXAMPLES:
        if index < len(result["prompts"]):
            beginning = result["prompts"][index][result["prompts"][index].rindex("\n\n\n") + 3 :]
            for kind, texts in result["texts"].items():
                lines += ["", f"Prompt {index}, {kind}:", "", "```python", beginning + texts[index], "```"]
    return lines


def throughput(result: Result) -> list[str]:
    """Return the section on speed."""
    lines = [
        f"The embedded model, in {result['dtype']} where no dtype is named, reads a prompt of the given length and "
        f"writes {result['tokens']} tokens. Medians of {result['rounds']} alternating turns.", "",
    ]
    rows = [
        [f"{int(length):,}", name, f"{row['prefill_tok_s']:,.0f}", f"{row['first_token_ms']:,.0f}",
         f"{row['decode_tok_s']:,.1f}"]
        for length, by_name in result["lengths"].items() for name, row in by_name.items()
    ]
    return lines + table(["prompt", "schedule", "prefill tok/s", "first token, ms", "decode tok/s"], rows)


SECTIONS: Mapping[str, tuple[str, Callable[[Result], list[str]]]] = {
    "mqar": ("Recall", mqar),
    "perplexity": ("Perplexity against length", perplexity),
    "coherence": ("Coherence", coherence),
    "throughput": ("Throughput", throughput),
}


def summary(kept: Sequence[Result]) -> list[str]:
    """Return the table of requirements and results."""
    rows: list[Sequence[object]] = []
    for entry in kept:
        result, device = entry["result"], entry["machine"]["device"]
        if entry["part"] in FIGURES:
            rows += [[figure, device, wanted, found] for figure, wanted, found in FIGURES[entry["part"]](result)]
    return table(["figure", "device", "wanted", "found"], rows)


def _mqar_figures(result: Result) -> list[tuple[str, str, str]]:
    return [
        (f"right answers at {P} pairs, {model}: worst of all ways", "99%" if P == "256" else "reported",
         percent(min(accuracy[P] for accuracy in found["accuracy"].values())))
        for model, found in result["models"].items() for P in found["answers"] if int(P) >= 256
    ]


def _perplexity_figures(result: Result) -> list[tuple[str, str, str]]:
    runs = result["runs"].values()
    return [
        (f"largest difference of a bucket, {dtype}", wanted,
         f"{max(run['bucket_difference'] for run in runs if run['dtype'] == dtype):.1e} nats")
        for dtype, wanted in (("float32", "1e-4 nats"), ("bfloat16", "0.01 nats"), ("float16", "reported"))
    ]


def _coherence_figures(result: Result) -> list[tuple[str, str, str]]:
    exact = [found for found in result["greedy"].values() if found["dtype"] == "float32"]
    texts = exact[0]["texts"]
    least = min(found["identical"] for found in exact)
    return [
        (f"greedy texts of {result['tokens']} bytes identical in all float32 ways", f"{texts} of {texts}",
         f"{least} of {texts}"),
        *((f"functions that parse, {kind}", "reported", percent(of["parse"]))
          for kind, of in result["judged"].items()),
    ]


FIGURES: Mapping[str, Callable[[Result], list[tuple[str, str, str]]]] = {
    "mqar": _mqar_figures, "perplexity": _perplexity_figures, "coherence": _coherence_figures,
}


def machines(entry: Result) -> str:
    """Return one line on where and how a part was measured."""
    machine, load = entry["machine"], entry["load_average"]
    versions = ", ".join(f"{key} {value}" for key, value in machine.items() if key not in ("device", "name", "threads"))
    busy = "" if load is None else f"; load average {load[0]:.1f}"
    quick = "; --quick, so in small" if entry["quick"] else ""
    when = f"; {entry['date']}, commit {entry['commit']}" if "date" in entry else ""
    return (f"*{machine['device']} ({machine['name']}), {machine['threads']} threads; {versions}; took "
            f"{entry['seconds']:.0f} s{busy}{quick}{when}.*")


def _title(title: str, entry: Result) -> str:
    machine = entry["machine"]
    when = [f"{entry['date']}, commit {entry['commit']}"] if "date" in entry else []
    return ", ".join([title, machine["device"], machine["name"], f"torch {machine['torch']}", *when])


def rewrite(out: Path, *, plots: bool) -> Path:
    """Write QUALITY.md in a folder from the results stored in it, and return its path; plots: as of `write`."""
    results = out / "quality" / "results"
    kept = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(results.glob("*.json"))]
    if not kept:
        raise SystemExit(f"{results} must hold a part's result, got nothing")
    return write(kept, out, plots=plots)


def write(kept: Sequence[Result], out: Path, *, plots: bool) -> Path:
    """Write QUALITY.md from the stored results of parts, in the order of the sections, and return its path.

    plots: whether to draw; a plot that was drawn before is shown either way.
    """
    kept = sorted(kept, key=lambda entry: (list(SECTIONS).index(entry["part"]), entry["machine"]["device"]))
    lines = [INTRODUCTION, "", *summary(kept)]
    for part, (title, section) in SECTIONS.items():
        for entry in (entry for entry in kept if entry["part"] == part):
            name = f"{part}_{entry['machine']['device']}"
            heading = f"## {title}, {entry['machine']['device']}"
            lines += ["", heading, "", machines(entry), "", *section(entry["result"])]
            plot = out / "quality" / "results" / f"{name}.png"
            if plots and part in drawing.DRAW:
                drawing.draw(part, _title(title, entry), entry["result"], plot)
            if plot.exists():
                lines += ["", f"![{title}](quality/results/{name}.png)"]
    path = out / "QUALITY.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
