"""Drop-in for mlstm_kernels: `mLSTMBackend`, which runs xlstm_large and tirex-2, and the kernel registries.

`mLSTMBackend.__init__` looks its kernels up once, so existing models do not see changes of the registries; therefore
the class's `forward` is replaced. Kernels with a sigmoid input gate run on `mlstm_sigmoid_chunkwise`.

Without CUDA, the Triton names of the registries resolve to ours, so that models with configs that name them can be
built. A model built in this way while patched refers to functions of this module, and still runs after removal.

With ``compat`` gradients omit the normaliser's, as those of the package's custbw and Triton kernels do, and states of
the native chunkwise kernels are rounded to k's dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_xlstm_ops.patch.adapters import mlstm, mlstm_sigmoid, requires_grad, returns_states
from torch_xlstm_ops.patch.replacements import Replacement
from torch_xlstm_ops.patch.upstream import mlstm_triton

BACKEND_PARAMETERS = (
    "self", "q", "k", "v", "i", "f", "c_initial", "n_initial", "m_initial", "return_last_states", "mode",
)
# Kernel names of ours for configs, and their schedules.
SCHEDULES: dict[str, str | None] = {"xlstm_ops": None, "xlstm_ops_queued": "queued", "xlstm_ops_ray": "ray"}
TRITON_CHUNKWISE = ("triton_limit_chunk", "triton_xl_chunk")


def replacements(compat: bool) -> Sequence[Replacement]:
    """Return the replacements."""
    from mlstm_kernels.torch import chunkwise, parallel, recurrent
    from mlstm_kernels.torch.backend_module import mLSTMBackend

    custbw = chunkwise.registry["native_custbw"]
    effect = "sequences of any length and steps are one op call"
    forward = Replacement(
        mLSTMBackend, "forward", lambda original: _backend_forward(original, custbw if compat else None), effect,
        BACKEND_PARAMETERS,
    )
    found = [forward]
    for name, schedule in SCHEDULES.items():
        found.append(_entry(chunkwise.registry, "chunkwise", name, functools.partial(sequence, schedule=schedule)))
    found.append(_entry(recurrent.registry_sequence, "recurrent sequence", "native_sequence__xlstm_ops", sequence))
    found.append(_entry(recurrent.registry_step, "recurrent step", "xlstm_ops", step))
    if not torch.cuda.is_available():
        chunks = custbw if compat else sequence
        found += [_entry(chunkwise.registry, "chunkwise", name, chunks) for name in TRITON_CHUNKWISE]
        found.append(_entry(parallel.registry, "parallel", "triton_limit_headdim", chunks))
        found.append(_entry(recurrent.registry_sequence, "recurrent sequence", "native_sequence__triton", sequence))
        found.append(_entry(recurrent.registry_step, "recurrent step", "triton", step))
        if not compat:
            found.append(_entry(chunkwise.registry, "chunkwise", "triton_xl_chunk_siging", sigmoid_sequence))
        found += mlstm_triton.replacements(custbw if compat else None)
    return found


def sequence(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor,
    c_initial: Tensor | None = None, n_initial: Tensor | None = None, m_initial: Tensor | None = None,
    return_last_states: bool = False, eps: float = 1e-6, schedule: str | None = None,
    dtype_state: torch.dtype = torch.float32, **ignored: Any,
) -> Any:
    """Run a sequence with the arguments of a registered kernel; chunk sizes and launch options are ignored."""
    h, state = mlstm(q, k, v, i, f, c_initial, n_initial, m_initial, eps=eps, schedule=schedule)
    return (h, _narrowed(state, dtype_state)) if return_last_states else h


def step(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, c: Tensor, n: Tensor, m: Tensor, eps: float = 1e-6,
    dtype_state: torch.dtype = torch.float32, **ignored: Any,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run one token, q (B, NH, DHQK), with the arguments of a registered step kernel."""
    h, state = mlstm(q.unsqueeze(2), k.unsqueeze(2), v.unsqueeze(2), i, f, c, n, m, eps=eps)
    return h.squeeze(2), _narrowed(state, dtype_state)


def sigmoid_sequence(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor,
    c_initial: Tensor | None = None, n_initial: Tensor | None = None, m_initial: Tensor | None = None,
    return_last_states: bool = False, eps: float = 1e-6, normalize: bool = True, **ignored: Any,
) -> Any:
    """Run a sequence with a sigmoid input gate with the arguments of a registered kernel; its state is c, n."""
    h, state = mlstm_sigmoid(q, k, v, i, f, c_initial, n_initial, None, normalize=normalize, eps=eps)
    return (h, tuple(state)) if return_last_states else h


def _entry(registry: dict[str, Any], kind: str, name: str, kernel: Callable[..., Any]) -> Replacement:
    place = f"mlstm_kernels.torch's {kind} kernel {name}"
    return Replacement(registry, name, lambda original: kernel, "resolves to ours", place=place)


def _backend_forward(original: Callable[..., Any], custbw: Callable[..., Any] | None) -> Callable[..., Any]:
    """Return a `mLSTMBackend.forward` on our operators; other recurrences go to `original`.

    custbw: the package's kernel without the normaliser's gradient, to use where the config selects such gradients.
    """

    def forward(
        self: Any, q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor,
        c_initial: Tensor | None = None, n_initial: Tensor | None = None, m_initial: Tensor | None = None,
        return_last_states: bool | None = None, mode: str | None = None,
    ) -> Any:
        config = self.config
        kernel = config.chunkwise_kernel
        if "siging" in kernel and custbw is not None:
            return original(self, q, k, v, i, f, c_initial, n_initial, m_initial, return_last_states, mode)
        both = returns_states(
            return_last_states, mode, mode_default=config.mode, states_default=config.return_last_states
        )
        if q.is_cuda and torch.is_autocast_enabled("cuda"):  # the kernels' dtype, which may differ from autocast's
            q, k, v = (t.to(getattr(torch, config.autocast_kernel_dtype)) for t in (q, k, v))
        asked = config.mode if mode is None else mode
        if "siging" in kernel:
            h, (c, n) = mlstm_sigmoid(q, k, v, i, f, c_initial, n_initial, m_initial, eps=config.eps,
                                      normalize=config.normalize_siging)
            m = [c.new_zeros((*n.shape[:2], 1))] if "inference" in asked else []  # where callers take three states
            return (h, (c, n, *m)) if both else h
        if custbw is not None and _without_normaliser(kernel) and requires_grad(q, k, v, i, f):
            if "triton" in kernel and not q.is_cuda:
                chunk = config.chunk_size if q.shape[2] % config.chunk_size == 0 else q.shape[2]  # the original pads
                return custbw(q, k, v, i, f, c_initial, n_initial, m_initial, both, config.eps, chunk)
            return original(self, q, k, v, i, f, c_initial, n_initial, m_initial, return_last_states, mode)
        schedule = SCHEDULES.get(kernel.removeprefix("chunkwise--"))
        h, state = mlstm(q, k, v, i, f, c_initial, n_initial, m_initial, eps=config.eps, schedule=schedule)
        rounds = custbw is not None and kernel.startswith("chunkwise--native") and q.shape[2] > 1
        dtype = k.dtype if rounds else getattr(torch, config.inference_state_dtype) if "inference" in asked else None
        return (h, _narrowed(state, dtype)) if both else h

    return forward


def _narrowed(state: Sequence[Tensor], dtype: torch.dtype | None) -> tuple[Tensor, ...]:
    """Cast a state to bfloat16 or float16; for another dtype, or None, return it unchanged."""
    return tuple(t.to(dtype) if dtype in (torch.bfloat16, torch.float16) else t for t in state)


def _without_normaliser(kernel: str) -> bool:
    return kernel.endswith("custbw") or "triton" in kernel
