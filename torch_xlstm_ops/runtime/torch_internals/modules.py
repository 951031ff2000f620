"""Forward hooks of modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from torch_xlstm_ops.runtime.torch_internals.need import need


class _Watched(dict[str, object]):
    """Placeholder for hooks that cannot be read; always true."""

    def __bool__(self) -> bool:
        return True


_UNKNOWN = _Watched(unknown=True)


def _unknown_hooks(module: nn.Module) -> Sequence[Mapping[Any, Any]]:
    return (_UNKNOWN,)


@need(_unknown_hooks, where=("torch.nn.Module.register_forward_hook",),
      without="a token runs a transformers block layer by layer, not as one compiled call")
def hooks(module: nn.Module) -> Sequence[Mapping[Any, Any]]:
    """Return the dictionaries of a module's forward hooks; hooks are added and removed in place."""
    return module._forward_hooks, module._forward_pre_hooks


def _assume_global_hooks() -> bool:
    return True


@need(_assume_global_hooks, where=(
        "torch.nn.modules.module._global_forward_hooks", "torch.nn.modules.module._global_forward_pre_hooks",
    ),
      without="a token runs a transformers block layer by layer, not as one compiled call")
def global_hooks() -> bool:
    """Return whether a forward hook for all modules is registered."""
    from torch.nn.modules import module

    return bool(module._global_forward_hooks or module._global_forward_pre_hooks)
