"""Drop-in for mlstm_kernels' `mLSTMBackend`, which runs xlstm_large and, with xlstm installed, transformers' xLSTM.

`mLSTMBackend.__init__` binds its kernels for good, so existing models never see a change of the registries: the
class's `forward` is what all of them share. Kernels with a sigmoid input gate are another recurrence and stay theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from torch_xlstm_ops.patch import Change
from torch_xlstm_ops.patch.kernels import check_signature, mlstm, returns_states

BACKEND_PARAMETERS = (
    "self", "q", "k", "v", "i", "f", "c_initial", "n_initial", "m_initial", "return_last_states", "mode",
)


def changes() -> Sequence[Change]:
    """Return what to replace."""
    from mlstm_kernels.torch.backend_module import mLSTMBackend

    check_signature(mLSTMBackend.forward, BACKEND_PARAMETERS)
    forward = _forward_or(mLSTMBackend.forward)
    return [Change(mLSTMBackend, "forward", forward, "sequences of any length and steps are one op call")]


def _forward_or(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `mLSTMBackend.forward` on our operators, which leaves other recurrences to `original`."""

    def forward(
        self: Any, q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor,
        c_initial: Tensor | None = None, n_initial: Tensor | None = None, m_initial: Tensor | None = None,
        return_last_states: bool | None = None, mode: str | None = None,
    ) -> Any:
        config = self.config
        if "siging" in config.chunkwise_kernel:
            return original(self, q, k, v, i, f, c_initial, n_initial, m_initial, return_last_states, mode)
        both = returns_states(
            return_last_states, mode, mode_default=config.mode, states_default=config.return_last_states
        )
        h, state = mlstm(q, k, v, i, f, c_initial, n_initial, m_initial, eps=config.eps)
        return (h, tuple(state)) if both else h

    return forward
