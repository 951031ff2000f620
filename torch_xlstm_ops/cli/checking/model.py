"""The embedded model, patched, on a device: its logits beside the unpatched model's on the CPU, and its speed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_xlstm_ops.models import DEMO_MODEL
from torch_xlstm_ops.models import transformers as adapter
from torch_xlstm_ops.patch import patch

PROMPT, DECODED, GENERATED = 200, 8, 32  # tokens of the prompt; that follow it one by one; that generate() writes
DTYPES = {torch.float32: 1e-4, torch.bfloat16: 0.1}  # with the error allowed: of logits, relative
MISSING = "not run: transformers is not installed"


class Phase(NamedTuple):
    """A part of the model's work: logits to compare, a call to time, and the tokens that one call reads or writes."""

    name: str
    meaning: str
    logits: Callable[[], Tensor]
    call: Callable[[], object]
    tokens: int


def missing() -> str | None:
    """Return why the model cannot be run, or None."""
    return MISSING if find_spec("transformers") is None else None


@torch.no_grad()
def expected() -> dict[str, Tensor]:
    """Return the unpatched model's logits in float32 on the CPU, by the name of the phase."""
    model = load(torch.float32, torch.device("cpu"))
    out = adapter.forward(model, _ids()[:, :PROMPT])
    return {"prompt": out.logits, "token": _decode(model, out.cache)}


def phases(dtype: torch.dtype, device: torch.device) -> Iterator[Phase]:
    """Yield the phases of the patched model, which must be done within ``with patched()``."""
    model, ids = load(dtype, device), _ids().to(device)
    cache = adapter.forward(model, ids[:, :PROMPT]).cache
    yield Phase("prompt", f"a prompt of {PROMPT} tokens through 6 blocks",
                lambda: adapter.forward(model, ids[:, :PROMPT]).logits,
                lambda: adapter.forward(model, ids[:, :PROMPT]), PROMPT)
    yield Phase("token", "a token after the prompt: the time between two characters of a text",
                lambda: _decode(model, adapter.forward(model, ids[:, :PROMPT]).cache),
                lambda: adapter.forward(model, ids[:, :1], cache), 1)
    yield Phase("generate", f"transformers' generate(), {GENERATED} tokens: what a user of transformers sees",
                lambda: torch.zeros(0), lambda: _generate(model, ids[:, :PROMPT]), GENERATED)


def patched() -> Any:
    """Return the handle of transformers' patch."""
    return patch("transformers")


def load(dtype: torch.dtype, device: torch.device) -> Any:
    """Return the embedded model."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=dtype).eval().to(device)


def _ids() -> Tensor:
    text = ("import os\n\n\ndef main() -> None:\n    print(os.environ)\n\n\n" * 8).encode()
    return torch.tensor([list(text[:PROMPT + DECODED])])


def _decode(model: Any, cache: Any) -> Tensor:
    ids = _ids().to(adapter.device_of(model))
    found = [adapter.forward(model, ids[:, t:t + 1], cache).logits for t in range(PROMPT, PROMPT + DECODED)]
    return torch.cat(found, 1)


def _generate(model: Any, ids: Tensor) -> object:
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=GENERATED,
                          min_new_tokens=GENERATED, do_sample=False)
