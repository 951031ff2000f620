"""Benchmarks at a glance: a table for the README and a picture, both from stored results."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from benchmarks import plots, results
from benchmarks.quality.report import check_plots, table
from benchmarks.suites import Row

PICTURE = results.FOLDER / "glance.png"
HEAD = ("what", "device", "ours", "best other package", "ratio", "date, commit")


class Shown(NamedTuple):
    """One row: its suite, its device and maybe label, the row's beginning, and what the README calls it."""

    suite: str
    device: str
    what: str
    name: str


SHOWN = (
    Shown("mlstm_prefill", "cpu", "prefill (1, 8, 256, 512), S 2,048, float32", "mLSTM prompt, 2,048 tokens, float32"),
    Shown("mlstm_step", "cpu", "step (1, 8, 256, 512)", "mLSTM token, float32"),
    Shown("slstm", "cpu", "forward + backward (4, 4, 64)", "sLSTM training, 256 tokens, float32"),
    Shown("model", "cpu", "decode, patched", "transformers model, a token, patched"),
    Shown("compile", "cpu", "first prompts of", "torch.compile, wait for first prompts of 4 lengths"),
    Shown("mlstm_prefill", "cuda", "prefill (1, 8, 256, 512), S 65,536", "mLSTM prompt, 65,536 tokens, bfloat16"),
    Shown("mlstm_train", "cuda", "train (8, 8, 256, 512)", "mLSTM training, 8 x 8,192 tokens, bfloat16"),
    Shown("mlstm_train", "cuda", "train (8, 16, 128, 256)", "the same, narrow heads"),
    Shown("mlstm_prefill", "cuda.h200", "on an idle device, prefill (1, 8, 256, 512), S 2,048",
          "mLSTM prompt, 2,048 tokens, bfloat16, idle GPU"),
    Shown("mlstm_train", "cuda.h200", "on an idle device, train (1, 8, 256, 512), S 2,048",
          "mLSTM training, 2,048 tokens, bfloat16, idle GPU"),
    Shown("slstm", "cuda.h200", "forward + backward (8, 4, 64)", "sLSTM training, 1,024 tokens, bfloat16"),
    Shown("slstm", "cuda.h200", "forward + backward (8, 4, 64), S 1,024, bfloat16, schedule sequential",
          "the same, schedule sequential"),
    Shown("training", "cuda.h200", "training step of 1 x 8,192 tokens, 4 layers of 4096, bfloat16, with checkpointing, "
          "backend xlstm", "4 blocks of xLSTM-7B, a training step, compiled"),
    Shown("model", "cuda", "prefill, patched", "transformers model, prompt of 63 tokens, patched"),
    Shown("model", "cuda.h200", "decode, patched", "transformers model, a token, patched"),
    Shown("model", "cuda.h200", "decode, patched, not compiled, against eager",
          "4 blocks of xLSTM-7B, a token, patched"),
)


def found() -> Iterator[tuple[Shown, results.Kept, Row]]:
    """Yield what is shown, the stored result that has it, and its row."""
    for shown in SHOWN:
        kept = results.stored(shown.suite, shown.device)
        yield shown, kept, next(row for row in results.rows(kept) if row.what.startswith(shown.what))


def lines() -> str:
    """Return the table."""
    return "\n".join(table(HEAD, [
        (shown.name, _device(kept), row.ours.split(",")[0], row.peer, f"{row.ratio:.2f}",
         f"{kept['date']}, {kept['commit'].split(';')[0]}")
        for shown, kept, row in found()
    ])) + "\n"


def draw() -> None:
    """Draw the picture."""
    check_plots()
    every = [*found()]
    dates = sorted({kept["date"] for _, kept, _ in every})
    plots.glance(PICTURE, f"torch_xlstm_ops, measured {' to '.join(sorted({dates[0], dates[-1]}))}",
                 [(f"{shown.name} ({_device(kept)})", row) for shown, kept, row in every])


def _device(kept: results.Kept) -> str:
    machine = next(part["result"]["machine"] for part in kept["parts"] if "result" in part)
    name = machine.get("name", kept["device"])
    return f"CPU, {machine['threads']} cores" if kept["device"] == "cpu" else name.replace("NVIDIA ", "").split()[0]

