"""Perplexity against length: the cost of a byte of held-out Python for the embedded model, by position."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.quality.contenders import THEIRS, Conditions, Contender, cut, read
from benchmarks.train_demo_model import END, standard_library
from torch_xlstm_ops.cli.shared.loading import load
from torch_xlstm_ops.models import DEMO_MODEL

FIRST = 256  # tokens of the first bucket; each further one doubles the position
PIECE = 4096  # tokens a forward of the reference
UNEVEN = (1, 63, 1000, 4097, 64, 8191)  # pieces that are not aligned with chunks
STEPS = 512  # tokens that are read one by one, at the start or the end of a row


class Run(NamedTuple):
    """One way to run the model, with the pieces of the text."""

    contender: Contender
    pieces: tuple[int, ...]
    cutting: str = ""

    @property
    def name(self) -> str:
        return ", ".join(filter(None, (self.contender.name, self.cutting)))


def held_out(rows: int, length: int) -> tuple[Tensor, list[str]]:
    """Return held-out text (rows, length) int64 and its files, in order of their names, an END before each.

    The character tables of `encodings` are left out, as the model has read near copies.
    Raises SystemExit where this Python's library has too little text.
    """
    sources = [source for source in standard_library()["test"] if not source.path.startswith("encodings/")]
    end = torch.tensor([END], dtype=torch.int16)
    text = torch.cat([part for source in sources for part in (end, source.tokens)])[1:]
    if len(text) < rows * length:
        raise SystemExit(f"the held-out files must hold {rows * length} bytes, got {len(text)}")
    starts = itertools.accumulate((len(source.tokens) + 1 for source in sources), initial=0)
    used = [source.path for source, start in zip(sources, starts, strict=False) if start < rows * length]
    return text[: rows * length].view(rows, length).long(), used


def edges(length: int) -> list[int]:
    """Return the positions at which buckets end."""
    found = [min(FIRST, length)]
    while found[-1] < length:
        found.append(min(2 * found[-1], length))
    return found


def cost(model: Any, text: Tensor, pieces: Sequence[int]) -> Tensor:
    """Return the nats (B, S) of each token of text (B, S), float64 on the CPU; the first follows an END."""
    ids = F.pad(text[:, :-1], (1, 0), value=END).to(model.device)
    found = []
    for where, logits, _ in read(model, ids, pieces):
        targets = text[:, where].to(model.device)
        found.append(F.cross_entropy(logits.double().mT, targets, reduction="none").cpu())
    return torch.cat(found, 1)


def by_bucket(nats: Tensor) -> list[float]:
    """Return the mean of nats (B, S) in each bucket of positions."""
    ends = edges(nats.shape[1])
    return [nats[:, start:end].mean().item() for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def runs(length: int, conditions: Conditions) -> list[Run]:
    """Return every way to read rows of `length` tokens that can run here; the reference is first."""
    schedules = [Contender(name, name) for name in conditions.schedules]
    ours = schedules[0]
    pieces = tuple(cut(length, [PIECE]))
    steps = min(STEPS, length // 2)
    halves = [Contender(dtype, ours.schedule, dtype) for dtype in ("bfloat16", "float16")]
    found = [Run(contender, pieces) for contender in (*schedules, *halves)]
    found += [
        Run(ours, (length,), "all at once"),
        Run(ours, tuple(cut(length, UNEVEN)), "uneven pieces"),
        Run(ours, (*[1] * steps, length - steps), f"first {steps} by steps"),
        Run(ours, (length - steps, *[1] * steps), f"last {steps} by steps"),
    ]
    if conditions.device.type == "cpu":  # in bfloat16 transformers' own code mixes dtypes and raises
        found.append(Run(Contender(THEIRS, None), pieces))
    return found


def compare(nats: Tensor, reference: Tensor) -> dict[str, Any]:
    """Return the buckets of a run, and their differences from the reference, in nats."""
    buckets, wanted = by_bucket(nats), by_bucket(reference)
    return {
        "nats": buckets, "mean": nats.mean().item(),
        "bucket_difference": max(abs(a - b) for a, b in zip(buckets, wanted, strict=True)),
        "mean_difference": abs((nats - reference).mean().item()),
        "token_difference": (nats - reference).abs().max().item(),
    }


def run(conditions: Conditions) -> dict[str, Any]:
    """Return the curve of every run, and its largest differences from the first one."""
    rows, length = (1, 2048) if conditions.quick else (2, 65536)
    text, files = held_out(rows, length)
    results: dict[str, Any] = {}
    reference: Tensor | None = None
    models: dict[str, Any] = {}
    for one in runs(length, conditions):
        dtype = one.contender.dtype
        models[dtype] = models.get(dtype) or load(DEMO_MODEL, conditions.device, dtype).model
        with torch.inference_mode(), one.contender.active():
            nats = cost(models[dtype], text, one.pieces)
        reference = nats if reference is None else reference
        results[one.name] = {"schedule": one.contender.schedule, "dtype": dtype, **compare(nats, reference)}
        conditions.say(f"perplexity: {one.name}: {results[one.name]['mean']:.6f} nats a byte, "
                       f"buckets within {results[one.name]['bucket_difference']:.1e}")
    return {"rows": rows, "length": length, "edges": edges(length), "files": files, "runs": results}
