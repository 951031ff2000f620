"""Submissions of a transformers model on MPS, by kind: of a token and of a prompt, in all and for each block.

Kernels are not run (`set_dry`), so that the 7B shape is counted at full size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from torch_xlstm_ops.models import DEMO_MODEL
from torch_xlstm_ops.models import transformers as adapter
from torch_xlstm_ops.patch import patch

from . import cases, emulator
from .upstream_bugs import PRODUCTS, report

PROMPT = 300  # tokens
KINDS = ("kernels", "products", "copies", "fills", "other")
COPIES, FILLS = {"copy_", "cat", "clone"}, {"fill_", "zero_"}
BUILDS: dict[str, Callable[[torch.dtype], Any]] = {}


def submissions(model: str, dtype: str, patched: bool) -> dict[str, Any]:
    """Return the kinds of a token's and a prompt's submissions, of the whole model and of one block, and the sources.

    One block is the difference that the last block makes.
    """
    emulator.set_dry(True)
    built = BUILDS[model](cases.DTYPES[dtype]).eval().to("mps")
    blocks = built.backbone.blocks
    context: AbstractContextManager[object] = patch("transformers") if patched else nullcontext()
    with context, torch.no_grad():
        whole = _count(built)
        built.backbone.blocks = blocks[:-1]
        less = _count(built)
    counted = {what: {"model": _kinds(whole[what]),
                      "block": {kind: _kinds(whole[what])[kind] - _kinds(less[what])[kind] for kind in KINDS}}
               for what in whole}
    calls = {what: report(log) for what, log in whole.items()}
    sources = sorted({launch.source for log in whole.values() for launch in log.launches})
    own = type(blocks[0].mlstm_layer).__module__.startswith("transformers.")
    return {**counted, "calls": calls, "own_classes": own, "sources": sources}


def _count(model: Any) -> dict[str, emulator.Log]:
    """Record the second call of each kind: the first compiles."""
    ids = torch.randint(3, 60, (1, PROMPT)).to("mps")
    cache = adapter.forward(model, ids).cache
    with emulator.recording() as prompt:
        adapter.forward(model, ids)
    adapter.forward(model, ids[:, :1], cache)
    with emulator.recording() as token:
        adapter.forward(model, ids[:, :1], cache)
    return {"token": token, "prompt": prompt}


def _kinds(log: emulator.Log) -> dict[str, int]:
    found = Counter(_kind(call.op) for call in log.aten)
    return {"kernels": len(log.launches), **{kind: found[kind] for kind in KINDS[1:]}}


def _kind(op: str) -> str:
    kinds = {"products": PRODUCTS, "copies": COPIES, "fills": FILLS}
    return next((kind for kind, ops in kinds.items() if op in ops), "other")


def _embedded(dtype: torch.dtype) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=dtype)


def _seven_b(dtype: torch.dtype) -> Any:
    """Return two blocks of xLSTM-7B's shape, with a small vocabulary and weights of zero."""
    import transformers

    config = transformers.xLSTMConfig(
        vocab_size=64, hidden_size=4096, num_hidden_layers=2, num_heads=8, qk_dim_factor=0.5, v_dim_factor=1.0,
        ffn_proj_factor=2.667, pad_token_id=0, bos_token_id=0, eos_token_id=None,
    )
    with torch.device("meta"):
        model = transformers.xLSTMForCausalLM(config)
    return model.to(dtype).to_empty(device="cpu")


BUILDS |= {"embedded": _embedded, "7B": _seven_b}
