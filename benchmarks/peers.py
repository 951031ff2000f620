"""The mLSTM functions of other packages by name, or the reason why one cannot run here."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

CHUNK_SIZES = (32, 64, 128, 256)

Run = Callable[..., Any]
Contenders = dict[str, Run | str]

_NATIVE = {
    "transformers native": ("transformers.models.xlstm.modeling_xlstm", "mlstm_chunkwise_native_autograd"),
    "mlstm_kernels native": ("mlstm_kernels.torch.chunkwise", "mlstm_chunkwise__native_autograd"),
}
_TRITON = {
    "mlstm_kernels xl_chunk": ("mlstm_kernels.torch.chunkwise", "mlstm_chunkwise__xl_chunk"),
    "mlstm_kernels limit_chunk": ("mlstm_kernels.torch.chunkwise", "mlstm_chunkwise__limit_chunk"),
}
_STEPS = {
    "transformers native": ("transformers.models.xlstm.modeling_xlstm", "mlstm_recurrent_step_native"),
    "mlstm_kernels native": ("mlstm_kernels.torch.recurrent", "mlstm_recurrent_step__native"),
}
_TRITON_STEPS = {"mlstm_kernels triton": ("mlstm_kernels.torch.recurrent", "mlstm_recurrent_step__triton")}
_NO_CUDA = "Triton kernels need CUDA"


def sequences(device: torch.device, dtype: torch.dtype) -> Contenders:
    """Return the functions over a sequence, q k v igate fgate -> (h, state), once for each of their chunk sizes."""
    found: Contenders = {}
    for name, place in (_NATIVE | _TRITON).items():
        run = _NO_CUDA if name in _TRITON and device.type != "cuda" else _find(*place)
        if isinstance(run, str):
            found[name] = run
        else:
            how: dict[str, Any] = {"autocast_kernel_dtype": dtype} if name in _TRITON else {}
            if name != "mlstm_kernels xl_chunk":  # does not compile with it in Triton 3.6
                how["return_last_states"] = True
            # Native code multiplies gates with the streams; with bfloat16 ones Triton 3.6 aborts on xl_chunk's kernels,
            # chunks of 64 and more.
            gates = torch.float32 if name in _TRITON else dtype
            found |= {f"{name} {size}": _sized(run, size, how, gates) for size in CHUNK_SIZES}
    return found


def references(device: torch.device, args: Sequence[Tensor], *, train: bool) -> dict[str, Callable[[], Any] | str]:
    """Return calls on q k v igate fgate of a simpler layer: the same products, no normaliser.

    The conversion to their layout (B, S, NH, D) is not timed. train: with the gradients of all of their arguments.
    """
    name = "fla simple_gla (no normaliser, no input gate)"
    run = _find("fla.ops.simple_gla", "chunk_simple_gla") if device.type == "cuda" else _NO_CUDA
    if isinstance(run, str):
        return {name: run}
    q, k, v, fgate = (args[i].transpose(1, 2).contiguous().requires_grad_(train) for i in (0, 1, 2, 4))

    def call() -> Any:
        h = run(q, k, v, torch.nn.functional.logsigmoid(fgate.float()), output_final_state=True)[0]
        return torch.autograd.grad(h, (q, k, v, fgate), torch.ones_like(h)) if train else h

    return {name: call}


def steps(device: torch.device) -> Contenders:
    """Return the functions over one token, q k v igate fgate c n m -> (h, state)."""
    found: Contenders = {name: _find(*place) for name, place in _STEPS.items()}
    for name, place in _TRITON_STEPS.items():
        found[name] = _find(*place) if device.type == "cuda" else _NO_CUDA
    return found


def _sized(function: Run, size: int, how: dict[str, Any], gates: torch.dtype) -> Run:
    def run(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> Any:
        if q.shape[2] % size:
            raise ValueError(f"S must be a multiple of {size}")
        found = function(q, k, v, i.to(gates), f.to(gates), chunk_size=size, **how)
        return found if isinstance(found, tuple) else (found,)

    return run


def _find(module: str, function: str) -> Run | str:
    try:
        found: Run = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return found
