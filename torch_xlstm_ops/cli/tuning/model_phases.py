"""What a model does, as workloads for the tuner: the first token of a prompt, and decoding."""

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

DECODED = 16  # tokens a call
THROUGH_LAYERS = 10  # how much larger than an operator's errors those of a model's logits may be


def first_token(loaded: Loaded, length: int, weight: float) -> Workload:
    """Return reading a prompt in pieces until its first token is on the host; needs `stream.prepared`."""
    prompt = _prompt(loaded, length)

    def results() -> Sequence[Tensor]:
        logits, _ = _read(loaded, prompt)
        int(logits[0, -1].argmax())
        return [logits]

    return Workload("first-token", length, length, weight, results, results, _tolerance(loaded))


def decode(loaded: Loaded, length: int, weight: float) -> Workload:
    """Return writing tokens after a prompt, from its state; needs `stream.prepared`."""
    _, first = _read(loaded, _prompt(loaded, length))
    going_on = copy.deepcopy(first)

    def steps(state: object, count: int) -> Tensor:
        token = _ids(loaded, [0])
        for _ in range(count):
            logits, state = adapter.run(loaded.model, token, state)
            token = logits[:, -1].argmax(-1, keepdim=True)
        return logits

    return Workload(
        "decode", length, DECODED, weight, lambda: steps(going_on, DECODED),
        lambda: [steps(copy.deepcopy(first), 2)], _tolerance(loaded),
    )


def _read(loaded: Loaded, prompt: Sequence[int]) -> tuple[Tensor, object]:
    """Return the logits and the state after a prompt."""
    state: object = None
    for size in stream.pieces(len(prompt), loaded.device):
        logits, state = adapter.run(loaded.model, _ids(loaded, prompt[:size]), state)
        prompt = prompt[size:]
    return logits, state


def _prompt(loaded: Loaded, length: int) -> list[int]:
    known = loaded.model.get_input_embeddings().num_embeddings
    found: list[int] = torch.randint(known, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    return found


def _ids(loaded: Loaded, tokens: Sequence[int]) -> Tensor:
    return torch.tensor([tokens], device=loaded.device)


def _tolerance(loaded: Loaded) -> float:
    return THROUGH_LAYERS * TOLERANCE[loaded.dtype]
