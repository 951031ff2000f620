"""Throughput: tokens a second of prefill and decode, and the time to the first token, by the prompt's length."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks.quality.contenders import THEIRS, Conditions, Contender
from benchmarks.quality.perplexity import held_out
from torch_xlstm_ops.cli.generation.meter import Meter
from torch_xlstm_ops.cli.generation.sampling import chooser
from torch_xlstm_ops.cli.generation.stream import generate_tokens, prepared
from torch_xlstm_ops.cli.shared.loading import Loaded, load
from torch_xlstm_ops.models import DEMO_MODEL

WARM_UP = 8  # tokens written before timing


def one(loaded: Loaded, prompt: Sequence[int], tokens: int) -> dict[str, float]:
    """Read a prompt and write tokens; return the rates and the time to the first token, for exactly `tokens`."""
    meter = Meter(loaded.device)
    with prepared(loaded):
        written = list(generate_tokens(loaded, prompt, chooser(), tokens, meter))
    prefill, decode = meter.final("prefill"), meter.final("decode")
    if prefill is None or decode is None or (prefill.tokens, decode.tokens) != (len(prompt), tokens - 1):
        raise SystemExit(f"{len(prompt)} tokens must be read and {tokens - 1} decoded, got {prefill} and {decode}")
    if len(written) != tokens:
        raise SystemExit(f"{tokens} tokens must be written, got {len(written)}")
    return {
        "prefill_tok_s": prefill.average_tok_s, "decode_tok_s": decode.average_tok_s,
        "first_token_ms": 1e3 * prefill.seconds,
    }


def contend(device: torch.device, schedules: Sequence[str]) -> list[Contender]:
    """Return every schedule in the usual dtype of the device, and transformers' own code.

    In bfloat16 that code mixes dtypes and raises, so there the first schedule and it also run in float32.
    """
    if device.type == "cpu":
        return [*(Contender(name, name) for name in schedules), Contender(THEIRS, None)]
    usual = [Contender(name, name, "bfloat16") for name in schedules]
    return [*usual, Contender(f"{schedules[0]}, float32", schedules[0]), Contender(f"{THEIRS}, float32", None)]


def measure(
    loaded: Mapping[str, Loaded], contenders: Sequence[Contender], length: int, tokens: int, rounds: int
) -> dict[str, Any]:
    """Time the contenders in turns on one prompt of `length` tokens; return the medians of each; models by dtype."""
    text, _ = held_out(1, length)
    prompt = text[0].tolist()
    if len(prompt) != length:
        raise SystemExit(f"the prompt must have {length} tokens, got {len(prompt)}")
    taken: dict[str, list[dict[str, float]]] = {contender.name: [] for contender in contenders}
    for _ in range(rounds):
        for contender in contenders:
            with contender.active():
                model = loaded[contender.dtype]
                one(model, prompt[-min(length, 4096) :], WARM_UP)  # patching drops compiled code
                taken[contender.name].append(one(model, prompt, tokens))
    return {
        name: {key: round(statistics.median(row[key] for row in rows), 2) for key in rows[0]}
        for name, rows in taken.items()
    }


def run(conditions: Conditions) -> dict[str, Any]:
    """Return the rates of every schedule, and of transformers' own code, at each length."""
    lengths, tokens, rounds = ([512], 16, 1) if conditions.quick else ([2048, 16384, 32768], 128, 3)
    contenders = contend(conditions.device, conditions.schedules)
    loaded = {contender.dtype: load(DEMO_MODEL, conditions.device, contender.dtype) for contender in contenders}
    results = {}
    for length in lengths:
        results[str(length)] = measure(loaded, contenders, length, tokens, rounds)
        conditions.say(f"throughput: {length} tokens: {results[str(length)]}")
    return {"dtype": contenders[0].dtype, "tokens": tokens, "rounds": rounds, "lengths": results}
