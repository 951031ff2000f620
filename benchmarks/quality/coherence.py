"""Coherence: the text of the embedded model, whether every way to run it writes the same, and its quality."""

from __future__ import annotations

import ast
import re
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.quality.contenders import THEIRS, Conditions, Contender, cut, read
from benchmarks.quality.prompts import PROMPTS
from torch_xlstm_ops.cli.generation.prompt import encode
from torch_xlstm_ops.cli.generation.sampling import chooser
from torch_xlstm_ops.cli.shared.loading import Loaded, load
from torch_xlstm_ops.models import DEMO_MODEL

UNEVEN = (63, 1, 200)  # pieces of a prompt, not aligned with chunks
TEMPERATURE, TOP_P = 0.7, 0.95


class Written(NamedTuple):
    """The continuation of a prompt."""

    tokens: list[int]
    logits: Tensor  # (tokens, V) float32 on the CPU, from which each token was chosen


def write(
    loaded: Loaded, prompts: Sequence[str], limit: int, pieces: Callable[[int], Sequence[int]], drawn: bool = False
) -> list[Written]:
    """Read prompts of one length as a batch and write `limit` tokens after each.

    pieces: from the length of the prompts to the pieces in which they are read.
    drawn: draw each token, from a seed of the prompt's own, rather than take the likeliest.
    """
    ids = encoded(loaded, prompts)
    choosers = [chooser(temperature=TEMPERATURE if drawn else 0.0, top_p=TOP_P, seed=seed) for seed in range(len(ids))]
    *_, (_, logits, state) = read(loaded.model, ids, pieces(ids.shape[1]))
    rows: list[Tensor] = []  # each (B, V)
    tokens: list[list[int]] = []  # each B
    while True:
        rows.append(logits[:, -1].cpu())
        tokens.append([choose(row) for choose, row in zip(choosers, rows[-1], strict=True)])
        if len(tokens) == limit:
            break
        (_, logits, state), = read(loaded.model, torch.tensor(tokens[-1], device=loaded.device)[:, None], [1], state)
    by_prompt = zip(zip(*tokens, strict=True), torch.stack(rows, 1), strict=True)
    return [Written(list(text), of) for text, of in by_prompt]


def reread(loaded: Loaded, prompts: Sequence[str], written: Sequence[Written]) -> list[Written]:
    """Return the likeliest token at each position of texts, each read with its prompt as one prefill."""
    before = encoded(loaded, prompts)
    after = torch.tensor([text.tokens[:-1] for text in written], device=loaded.device, dtype=before.dtype)
    ids = torch.cat([before, after], 1)
    (_, logits, _), = read(loaded.model, ids, [ids.shape[1]])
    rows = logits[:, before.shape[1] - 1 :].cpu()
    return [Written(row.argmax(-1).tolist(), row) for row in rows]


def encoded(loaded: Loaded, prompts: Sequence[str]) -> Tensor:
    """Return the tokens (B, S) of prompts of one length."""
    return torch.tensor([encode(loaded, prompt) for prompt in prompts], device=loaded.device)


def divergence(found: Sequence[Written], reference: Sequence[Written]) -> dict[str, Any]:
    """Return the number of texts equal to the reference, and where and by what margin the others differ.

    The margin is the reference's: the logit of its token less that of the token that was found there.
    """
    parted = []
    for index, (mine, wanted) in enumerate(zip(found, reference, strict=True)):
        at = next((i for i, (a, b) in enumerate(zip(mine.tokens, wanted.tokens, strict=True)) if a != b), None)
        if at is not None:
            margin = wanted.logits[at, wanted.tokens[at]] - wanted.logits[at, mine.tokens[at]]
            parted.append({"prompt": index, "token": at, "margin": margin.item()})
    return {"identical": len(found) - len(parted), "texts": len(found), "parted": parted}


def smallest_margin(reference: Sequence[Written]) -> float:
    """Return the minimal margin of a chosen token over the second one, in logits."""
    best = torch.cat([written.logits for written in reference]).topk(2).values
    return float((best[:, 0] - best[:, 1]).min())


def words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


def distinct(text: str, n: int) -> float:
    """Return the share of distinct n-grams of words and signs in a text."""
    grams = list(zip(*(words(text)[i:] for i in range(n)), strict=False))
    return len(set(grams)) / len(grams) if grams else 1.0


def repeated_lines(text: str) -> float:
    """Return the share of a text's lines, except blank ones, that repeat an earlier line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return 1 - len(set(lines)) / len(lines) if lines else 0.0


def function(text: str) -> tuple[str, bool]:
    """Return the function at the start of a text, and whether it ends: a line without indent follows.

    The rest of a function that did not end is cut after its last whole line.
    """
    lines = text.splitlines(keepends=True)
    first = next(i for i, line in enumerate(lines) if line.startswith(("def ", "class ", "async def ")))
    for index in range(first + 1, len(lines)):
        line = lines[index]
        if line.strip() and not line[0].isspace() and line.endswith("\n"):
            return "".join(lines[first:index]), True
    return "".join(line for line in lines[first:] if line.endswith("\n")), False


def parses(source: str) -> bool:
    try:
        ast.parse(source)
    except (SyntaxError, ValueError):
        return False
    return True


def judge(prompts: Sequence[str], texts: Sequence[str]) -> dict[str, float]:
    """Return the variety of texts, and the share of the prompts' functions that parse."""
    functions = [function(prompt + text) for prompt, text in zip(prompts, texts, strict=True)]
    ended = [parses(source) for source, whole in functions if whole]
    return {
        "distinct_2": statistics.mean(distinct(text, 2) for text in texts),
        "distinct_3": statistics.mean(distinct(text, 3) for text in texts),
        "repeated_lines": statistics.mean(repeated_lines(text) for text in texts),
        "parse": statistics.mean(parses(source) for source, _ in functions),
        "ended": len(ended), "ended_and_parse": sum(ended),
    }


class _Bench(NamedTuple):
    """Settings of one run of this part."""

    conditions: Conditions
    models: dict[str, Loaded]  # by dtype
    prompts: Sequence[str]
    limit: int  # tokens to write

    def compare(
        self, name: str, contender: Contender, reference: Sequence[Written] | None,
        produce: Callable[[Loaded], list[Written]],
    ) -> tuple[dict[str, Any], list[Written]]:
        """Return the differences of a contender's texts from the reference, and the texts."""
        with torch.inference_mode(), contender.active():
            texts = produce(self.models[contender.dtype])
        found = divergence(texts, texts if reference is None else reference)
        self.conditions.say(f"coherence: {name}: {found['identical']} of {found['texts']} identical")
        return {"schedule": contender.schedule, "dtype": contender.dtype, **found}, texts

    def greedy(self) -> tuple[dict[str, Any], list[Written]]:
        """Generate the likeliest tokens in every way; return the results, and the texts of the reference."""
        schedules = [Contender(name, name) for name in self.conditions.schedules]
        ours, whole = schedules[0], lambda length: [length]
        ways: list[tuple[str, Contender, Callable[[int], Sequence[int]]]] = [
            *((one.name, one, whole) for one in schedules),
            ("prompt by steps", ours, lambda length: [1] * length),
            ("prompt in uneven pieces", ours, lambda length: cut(length, UNEVEN)),
            ("bfloat16", Contender("bfloat16", ours.schedule, "bfloat16"), whole),
            *([(THEIRS, Contender(THEIRS, None), whole)] if self.conditions.device.type == "cpu" else []),
        ]
        results: dict[str, Any] = {}
        reference: list[Written] | None = None
        produce: Callable[[Loaded], list[Written]]
        for name, contender, pieces in ways:
            produce = partial(write, prompts=self.prompts, limit=self.limit, pieces=pieces)
            results[name], texts = self.compare(name, contender, reference, produce)
            reference = reference or texts
        assert reference is not None
        for one in schedules:
            name = f"{one.name}, all read at once"
            produce = partial(reread, prompts=self.prompts, written=reference)
            results[name], _ = self.compare(name, one, reference, produce)
        return results, reference

    def sampled(self) -> tuple[dict[str, Any], list[Written]]:
        """Sample tokens with fixed seeds under every schedule; return the results, and the texts of the first one."""
        results: dict[str, Any] = {}
        reference: list[Written] | None = None
        produce = partial(write, prompts=self.prompts, limit=self.limit, pieces=lambda length: [length], drawn=True)
        for name in self.conditions.schedules:
            results[name], texts = self.compare(f"drawn, {name}", Contender(name, name), reference, produce)
            reference = reference or texts
        assert reference is not None
        return results, reference


def run(conditions: Conditions) -> dict[str, Any]:
    """Return the texts, their differences between ways to run the model, and their quality."""
    prompts, limit = (PROMPTS[:4], 64) if conditions.quick else (PROMPTS, 256)
    models = {dtype: load(DEMO_MODEL, conditions.device, dtype) for dtype in ("float32", "bfloat16")}
    bench = _Bench(conditions, models, prompts, limit)
    greedy, reference = bench.greedy()
    sampled, drawn = bench.sampled()
    decode = models["float32"].tokenizer.decode
    texts = {kind: [decode(written.tokens) for written in of] for kind, of in
             (("greedy", reference), ("sampled", drawn))}
    return {
        "tokens": limit, "temperature": TEMPERATURE, "top_p": TOP_P, "greedy": greedy, "sampled": sampled,
        "smallest_margin": smallest_margin(reference),
        "judged": {kind: judge(prompts, of) for kind, of in texts.items()}, "prompts": list(prompts), "texts": texts,
    }
