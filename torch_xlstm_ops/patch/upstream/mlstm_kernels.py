"""Drop-in for mlstm_kernels: `mLSTMBackend`, which runs xlstm_large and tirex-2, and the registries of kernels.

`mLSTMBackend.__init__` binds its kernels for good, so existing models never see a change of the registries: the
class's `forward` is what all of them share. Kernels with a sigmoid input gate are another recurrence and stay theirs.

Where there is no CUDA, the registries' Triton names resolve to ours, so that configs which name them build. A model
built so while patched holds functions of this module, and keeps running after removal.

With ``compat`` gradients leave out the normaliser's, as the peer's custbw and Triton kernels do, and states of the
native chunkwise kernels are rounded to k's dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_xlstm_ops.patch.kernels import learning, mlstm, returns_states
from torch_xlstm_ops.patch.replacements import Change

BACKEND_PARAMETERS = (
    "self", "q", "k", "v", "i", "f", "c_initial", "n_initial", "m_initial", "return_last_states", "mode",
)
# The names that ask for ours in a config, and the schedules they mean.
SCHEDULES: dict[str, str | None] = {"xlstm_ops": None, "xlstm_ops_queued": "queued", "xlstm_ops_ray": "ray"}
TRITON_CHUNKWISE = ("triton_limit_chunk", "triton_xl_chunk")


def changes(compat: bool) -> Sequence[Change]:
    """Return what to replace."""
    from mlstm_kernels.torch import chunkwise, parallel, recurrent
    from mlstm_kernels.torch.backend_module import mLSTMBackend

    custbw = chunkwise.registry["native_custbw"]
    effect = "sequences of any length and steps are one op call"
    forward = Change(
        mLSTMBackend, "forward", lambda theirs: _forward_or(theirs, custbw if compat else None), effect,
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
    return found


def sequence(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor,
    c_initial: Tensor | None = None, n_initial: Tensor | None = None, m_initial: Tensor | None = None,
    return_last_states: bool = False, eps: float = 1e-6, schedule: str | None = None,
    dtype_state: torch.dtype = torch.float32, **ignored: Any,
) -> Any:
    """Run a sequence as a kernel of the registries does; chunk sizes and launch options are ours to choose."""
    h, state = mlstm(q, k, v, i, f, c_initial, n_initial, m_initial, eps=eps, schedule=schedule)
    return (h, _narrowed(state, dtype_state)) if return_last_states else h


def step(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, c: Tensor, n: Tensor, m: Tensor, eps: float = 1e-6,
    dtype_state: torch.dtype = torch.float32, **ignored: Any,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Advance by one token, q (B, NH, DHQK), as a step kernel of the registries does."""
    h, state = mlstm(q.unsqueeze(2), k.unsqueeze(2), v.unsqueeze(2), i, f, c, n, m, eps=eps)
    return h.squeeze(2), _narrowed(state, dtype_state)


def _entry(registry: dict[str, Any], kind: str, name: str, kernel: Callable[..., Any]) -> Change:
    place = f"mlstm_kernels.torch's {kind} kernel {name}"
    return Change(registry, name, lambda theirs: kernel, "resolves to ours", place=place)


def _forward_or(original: Callable[..., Any], custbw: Callable[..., Any] | None) -> Callable[..., Any]:
    """Return a `mLSTMBackend.forward` on our operators, which leaves other recurrences to `original`.

    custbw: the peer's kernel without the normaliser's gradient, to repeat that where the config means it.
    """

    def forward(
        self: Any, q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor,
        c_initial: Tensor | None = None, n_initial: Tensor | None = None, m_initial: Tensor | None = None,
        return_last_states: bool | None = None, mode: str | None = None,
    ) -> Any:
        config = self.config
        kernel = config.chunkwise_kernel
        if "siging" in kernel:
            return original(self, q, k, v, i, f, c_initial, n_initial, m_initial, return_last_states, mode)
        both = returns_states(
            return_last_states, mode, mode_default=config.mode, states_default=config.return_last_states
        )
        if q.is_cuda and torch.is_autocast_enabled("cuda"):  # the kernels' own choice, which need not be autocast's
            q, k, v = (t.to(getattr(torch, config.autocast_kernel_dtype)) for t in (q, k, v))
        if custbw is not None and _without_normaliser(kernel) and learning(q, k, v, i, f):
            if "triton" in kernel and not q.is_cuda:
                chunk = config.chunk_size if q.shape[2] % config.chunk_size == 0 else q.shape[2]  # theirs pads
                return custbw(q, k, v, i, f, c_initial, n_initial, m_initial, both, config.eps, chunk)
            return original(self, q, k, v, i, f, c_initial, n_initial, m_initial, return_last_states, mode)
        schedule = SCHEDULES.get(kernel.removeprefix("chunkwise--"))
        h, state = mlstm(q, k, v, i, f, c_initial, n_initial, m_initial, eps=config.eps, schedule=schedule)
        rounds = custbw is not None and kernel.startswith("chunkwise--native") and q.shape[2] > 1
        asked = config.mode if mode is None else mode
        dtype = k.dtype if rounds else getattr(torch, config.inference_state_dtype) if "inference" in asked else None
        return (h, _narrowed(state, dtype)) if both else h

    return forward


def _narrowed(state: Sequence[Tensor], dtype: torch.dtype | None) -> tuple[Tensor, ...]:
    """Return a state in a narrower dtype where one is asked for by name; float32 asks for nothing."""
    return tuple(t.to(dtype) if dtype in (torch.bfloat16, torch.float16) else t for t in state)


def _without_normaliser(kernel: str) -> bool:
    return kernel.endswith("custbw") or "triton" in kernel
