"""The phases of a model as workloads for the tuner: the first token of a prompt, and decoding."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from torch_xlstm_ops.cli.generation import stream
from torch_xlstm_ops.cli.shared.loading import Loaded
from torch_xlstm_ops.maths.tolerance import TOLERANCE
from torch_xlstm_ops.models import transformers as adapter
from torch_xlstm_ops.tune.workloads import Workload

DECODED_TOKENS = 16  # per call
THROUGH_LAYERS = 10  # how many times an operator's error a model's logits may have


def first_token(loaded: Loaded, length: int, weight: float) -> Workload:
    """Return the workload of reading a prompt until its first token is on the host; needs `stream.prepared`."""
    prompt = _prompt(loaded, length)

    def results() -> Sequence[Tensor]:
        logits, _ = _read(loaded, prompt)
        int(logits[0].argmax())
        return [logits]

    return Workload("first-token", length, length, weight, results, results, _tolerance(loaded))


def decode(loaded: Loaded, length: int, weight: float) -> Workload:
    """Return the workload of decoding after a prompt, from its state; needs `stream.prepared`."""
    _, first = _read(loaded, _prompt(loaded, length))
    running = copy.deepcopy(first)

    def steps(cache: object, count: int) -> Tensor:
        token = torch.tensor([[0]], device=loaded.device)
        for _ in range(count):
            logits, cache = adapter.forward_last(loaded.model, token, cache)
            token = logits.argmax(-1, keepdim=True)
        return logits

    return Workload(
        "decode", length, DECODED_TOKENS, weight, lambda: steps(running, DECODED_TOKENS),
        lambda: [steps(copy.deepcopy(first), 2)], _tolerance(loaded),
    )


def _read(loaded: Loaded, prompt: Sequence[int]) -> tuple[Tensor, object]:
    """Return the last logits (1, V) and the cache after a prompt, read in the pieces of `stream.pieces`."""
    cache: object = None
    for size in stream.pieces(len(prompt), loaded.device):
        logits, cache = adapter.forward_last(loaded.model, torch.tensor([prompt[:size]], device=loaded.device), cache)
        prompt = prompt[size:]
    return logits, cache


def _prompt(loaded: Loaded, length: int) -> list[int]:
    vocabulary = adapter.vocabulary_size(loaded.model)
    found: list[int] = torch.randint(vocabulary, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    return found


def _tolerance(loaded: Loaded) -> float:
    return THROUGH_LAYERS * TOLERANCE[loaded.dtype]
