"""Compile ahead of time what a model, or a layer of some heads, needs on this machine's CPU."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch
from torch import Tensor

from torch_xlstm_ops.api import mlstm_chunkwise, mlstm_step, mlstm_step_, slstm_sequence, slstm_step
from torch_xlstm_ops.cli.shared.errors import BadInput
from torch_xlstm_ops.cli.shared.loading import load
from torch_xlstm_ops.runtime.torch_internals import OperatorMode

# Tokens of a prompt: one chunk, several, a loop of steps, and a step. Every other length runs what these run.
_LENGTHS = (40, 300, 2, 1)


_FLAGS = {"--shape": ("NHxDHQKxDHHV", "4x64x128"), "--slstm": ("NHxDH", "4x64")}


def sizes(flag: str, text: str) -> tuple[int, ...]:
    """Return the numbers in the text of --shape, such as 4x64x128, or of --slstm, such as 4x64. Raises BadInput."""
    names, example = _FLAGS[flag]
    if not re.fullmatch("x".join([r"[1-9]\d*"] * len(example.split("x"))), text, re.ASCII):
        raise BadInput(f"{flag} must be {names}, such as {example}, got {text!r}")
    return tuple(map(int, text.split("x")))


def threads(options: str) -> str:
    """Return the number of threads among the options of a kernel."""
    found = re.search(r"'cpp\.threads', (\d+)", options)
    return found[1] if found else ""


def warm_mlstm(B: int, NH: int, DHQK: int, DHHV: int, dtype: torch.dtype, *, training: bool) -> None:
    """Call the mLSTM's operators for B batch entries of some heads, and for training their gradients."""
    state = [torch.zeros(B, NH, DHQK, DHHV), torch.zeros(B, NH, DHQK), torch.zeros(B, NH, 1)]

    def streams(*tokens: int) -> list[Tensor]:
        sizes = [(*tokens, DHQK), (*tokens, DHQK), (*tokens, DHHV)]
        return [torch.randn(B, NH, *size, dtype=dtype) for size in sizes]

    name = f"mLSTM {NH}x{DHQK}x{DHHV}"
    with torch.no_grad():
        _tell(name, "steps")
        gates = [torch.zeros(B, NH, 1), torch.zeros(B, NH, 1)]
        mlstm_step(*streams(), *gates, *state)
        mlstm_step_(*streams(), *gates, *(t.clone() for t in state))
    for length in _LENGTHS:
        for before in ([], state):
            _tell(name, f"{length} tokens" + (" after others" if before else ""))
            args = [t.requires_grad_(training) for t in streams(length)]
            h, _ = mlstm_chunkwise(*args, *(torch.zeros(B, NH, length) for _ in range(2)), *before)
            if training:
                torch.autograd.grad(h.sum(), args)


def warm_slstm(B: int, NH: int, DH: int, dtype: torch.dtype, *, training: bool) -> None:
    """Call the sLSTM's operators for B batch entries of some heads, and for training their gradients."""
    name, state = f"sLSTM {NH}x{DH}", [torch.zeros(B, NH, DH) for _ in range(4)]
    r, b = (torch.randn(size, dtype=dtype) for size in ((4, NH, DH, DH), (4, NH, DH)))
    with torch.no_grad():
        _tell(name, "step")
        slstm_step(torch.randn(B, 4, NH, DH, dtype=dtype), r, b, *state)
    for length in _LENGTHS:
        for before in ([], state):
            _tell(name, f"{length} tokens" + (" after others" if before else ""))
            args = [t.requires_grad_(training) for t in (torch.randn(B, length, 4, NH, DH, dtype=dtype), r, b)]
            h, _ = slstm_sequence(*args, *before)
            if training:
                torch.autograd.grad(h.sum(), args)


def warm_model(directory: Path, B: int, dtype: str) -> None:
    """Read B prompts and decode a token with a patched model. Raises BadInput."""
    from torch_xlstm_ops.models import transformers as adapter
    from torch_xlstm_ops.patch import patch

    loaded = load(directory, torch.device("cpu"), dtype, patched=True)
    handle = patch("transformers")
    try:
        with torch.inference_mode(), adapter.first_block_only(loaded.model):
            for length in _LENGTHS:
                _tell(directory.name, f"{length} tokens, and one after them")
                ids = torch.zeros(B, length, dtype=torch.long)
                cache = adapter.forward_last(loaded.model, ids).cache
                adapter.forward_last(loaded.model, ids[:, :1], cache)
                adapter.forward_last(loaded.model, ids, cache)
                with OperatorMode(lambda call, args, options: call(*args, **options)):  # layer by layer, as if traced
                    adapter.forward_last(loaded.model, ids[:, :1], cache)
    finally:
        handle.remove()


def _tell(*parts: str) -> None:
    print("compiling", *parts, file=sys.stderr, flush=True)
