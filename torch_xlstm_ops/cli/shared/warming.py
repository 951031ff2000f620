"""Compile ahead of time what a model, or an mLSTM of some heads, needs on this machine's CPU."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch
from torch import Tensor

from torch_xlstm_ops.api import mlstm_chunkwise, mlstm_step, mlstm_step_
from torch_xlstm_ops.cli.shared.errors import BadInput
from torch_xlstm_ops.cli.shared.loading import load

# Tokens of a prompt: one chunk, several, and a loop of steps. Every other length runs what these run.
_LENGTHS = (40, 300, 2)


def shape(text: str) -> tuple[int, int, int]:
    """Return NH, DHQK and DHHV of a text such as 4x64x128. Raises BadInput."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", text)
    if found is None:
        raise BadInput(f"--shape must be NHxDHQKxDHHV, such as 4x64x128, got {text!r}")
    return int(found[1]), int(found[2]), int(found[3])


def threads(options: str) -> str:
    """Return the number of threads among the options of a kernel."""
    found = re.search(r"'cpp\.threads', (\d+)", options)
    return found[1] if found else ""


def warm_shape(NH: int, DHQK: int, DHHV: int, dtype: torch.dtype, *, training: bool) -> None:
    """Call the mLSTM's operators for one batch entry of some heads, and for training their gradients."""
    state = [torch.zeros(1, NH, DHQK, DHHV), torch.zeros(1, NH, DHQK), torch.zeros(1, NH, 1)]

    def streams(*tokens: int) -> list[Tensor]:
        sizes = [(*tokens, DHQK), (*tokens, DHQK), (*tokens, DHHV)]
        return [torch.randn(1, NH, *size, dtype=dtype) for size in sizes]

    name = f"{NH}x{DHQK}x{DHHV}"
    with torch.no_grad():
        _tell(name, "steps")
        gates = [torch.zeros(1, NH, 1), torch.zeros(1, NH, 1)]
        mlstm_step(*streams(), *gates, *state)
        mlstm_step_(*streams(), *gates, *(t.clone() for t in state))
    for length in _LENGTHS:
        for before in ([], state):
            _tell(name, f"{length} tokens" + (" after others" if before else ""))
            args = [t.requires_grad_(training) for t in streams(length)]
            h, _ = mlstm_chunkwise(*args, *(torch.zeros(1, NH, length) for _ in range(2)), *before)
            if training:
                torch.autograd.grad(h.sum(), args)


def warm_model(directory: Path, dtype: str) -> None:
    """Read prompts and decode a token with a patched model. Raises BadInput."""
    from torch_xlstm_ops.models import transformers as adapter
    from torch_xlstm_ops.patch import patch

    loaded = load(directory, torch.device("cpu"), dtype, patched=True)
    handle = patch("transformers")
    try:
        with torch.inference_mode(), adapter.first_block_only(loaded.model):
            for length in _LENGTHS:
                _tell(directory.name, f"{length} tokens, and one after them")
                ids = torch.zeros(1, length, dtype=torch.long)
                cache = adapter.forward_last(loaded.model, ids).cache
                adapter.forward_last(loaded.model, ids[:, :1], cache)
                adapter.forward_last(loaded.model, ids, cache)
    finally:
        handle.remove()


def _tell(*parts: str) -> None:
    print("compiling", *parts, file=sys.stderr, flush=True)
