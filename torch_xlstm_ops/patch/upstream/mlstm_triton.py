"""The Triton functions of mlstm_kernels, imported by name, on ours where there is no CUDA.

Each calls a global of its module that launches the kernels. That global is replaced, so that the function may have been
imported before.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from torch_xlstm_ops.patch.adapters import mlstm, mlstm_sigmoid
from torch_xlstm_ops.patch.replacements import Replacement

Run = Callable[..., Sequence[Any]]
EFFECT = "runs on ours without CUDA, by whatever name it was imported"


class Launch:
    """Takes the place of an autograd function that launches kernels."""

    def __init__(self, run: Run) -> None:
        self.apply = run


def replacements(custbw: Callable[..., Any] | None) -> Sequence[Replacement]:
    """Return the replacements.

    custbw: the package's chunkwise kernel without the normaliser's gradient, to run in place of ours; None for ours.
    """
    if importlib.util.find_spec("triton") is None:  # then the package has no such functions
        return []
    chunks: Run = _run if custbw is None else functools.partial(_run_custbw, custbw)
    found = [
        _replacement("chunkwise.triton_limit_chunk.fwbw", "_get_chunkwise_fwbw_kernel", ("autocast_kernel_dtype",),
                     _made(lambda *a: chunks(*a[:8], eps=a[12], chunk_size=a[11]))),
        _replacement("chunkwise.triton_xl_chunk.fwbw", "_get_chunkwise_fwbw_kernel", ("autocast_kernel_dtype",),
                     _made(lambda *a: chunks(*a[:8], eps=a[10], chunk_size=a[11]))),
        _replacement("parallel.triton_limit_headdim.fwbw", "_get_parallel_fwbw_kernel", ("autocast_kernel_dtype",),
                     _made(lambda *a: chunks(*a[:5], None, None, None, eps=a[5], chunk_size=a[0].shape[2])[:3])),
        _replacement("recurrent.triton_step", "mlstm_recurrent_step__triton_fw", None, _step),
    ]
    if custbw is None:
        found.append(_replacement("chunkwise.triton_xl_chunk_siging.fwbw", "_mlstm_siging_chunkwise_fwbw_generator",
                                  ("autocast_kernel_dtype", "normalize"), _sigmoid))
    return found


def _replacement(module: str, name: str, parameters: tuple[str, ...] | None, ours: Callable[..., Any]) -> Replacement:
    owner = importlib.import_module(f"mlstm_kernels.torch.{module}")
    return Replacement(owner, name, lambda original: ours, EFFECT, parameters)


def _made(run: Run) -> Callable[..., Launch]:
    def make(autocast_kernel_dtype: object = None) -> Launch:
        return Launch(run)

    return make


def _run(*tensors: Any, eps: float, chunk_size: int) -> Sequence[Any]:
    h, state = mlstm(*tensors, eps=eps)
    return h, *state


def _run_custbw(custbw: Callable[..., Any], *tensors: Any, eps: float, chunk_size: int) -> Sequence[Any]:
    h, state = custbw(*tensors, True, eps, chunk_size)
    return h, *state


def _sigmoid(autocast_kernel_dtype: object = None, normalize: bool = True) -> Launch:
    def run(*a: Any) -> Sequence[Any]:
        q, k, v, igate, fgate, c, n = a[:7]
        h, state = mlstm_sigmoid(q, k, v, igate, fgate, c, n, None, normalize=normalize, eps=a[9])
        return h, *state

    return Launch(run)


def _step(
    matC_old: Tensor, vecN_old: Tensor, scaM_old: Tensor, vecQ: Tensor, vecK: Tensor, vecV: Tensor, scaI: Tensor,
    scaF: Tensor, matC_new: Tensor | None = None, vecN_new: Tensor | None = None, scaM_new: Tensor | None = None,
    qk_scale: float | None = None, eps: float = 1e-6, dtype_state: Any = None, **ignored: Any,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Replace `mlstm_recurrent_step__triton_fw`, which writes the new state into tensors that it is given."""
    q = vecQ if qk_scale is None else vecQ * (qk_scale * vecQ.shape[-1] ** 0.5)
    h, state = mlstm(q.unsqueeze(2), vecK.unsqueeze(2), vecV.unsqueeze(2), scaI, scaF, matC_old, vecN_old, scaM_old,
                     eps=eps)
    given = (matC_new, vecN_new, scaM_new)
    after = tuple(new.to(dtype_state or new.dtype) if old is None else old.copy_(new)
                  for old, new in zip(given, state, strict=True))
    return h.squeeze(2), after
