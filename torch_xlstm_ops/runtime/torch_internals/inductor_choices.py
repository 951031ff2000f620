"""What Inductor decides: its options, and a heuristic that is changed while a function is compiled."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch_xlstm_ops.runtime.torch_internals.need import need


def _all_options(options: Mapping[str, Any]) -> dict[str, Any]:
    return dict(options)


@need(_all_options, where=("torch._inductor.config.get_config_copy",),
      without="options of Inductor that this torch lacks raise an error")
def supported_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that this torch has; the missing ones would only make kernels faster."""
    from torch._inductor import config

    known = config.get_config_copy()
    return {name: value for name, value in options.items() if name in known}


PERSISTENT = 256  # elements of a row that a CUDA kernel keeps in registers, such as the tokens of a chunk


def _default_choices() -> Any:
    from torch._inductor.choices import InductorChoices

    return InductorChoices()


@need(_default_choices, where=("torch._inductor.choices.InductorChoices.should_use_persistent_reduction",),
      without="CUDA kernels may read rows of scores once more")
def reduction_choices() -> Any:
    """Return Inductor's heuristics with one change: a CUDA kernel reads a row of scores once."""
    return _choices()


@functools.cache
def _choices() -> Any:
    """Return the changed heuristics.

    Inductor does not recognise rows computed from gates as contiguous. It then loops over them, and reads them again
    for each sum: 0.76 ms instead of 0.51 in a forward pass of 4 ms (H100, chunks of 256).
    """
    from torch._inductor.choices import InductorChoices

    original = InductorChoices.should_use_persistent_reduction

    class Choices(InductorChoices):
        @staticmethod
        def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
            elements = features.reduction_numel
            if not cooperative_reduction and getattr(elements, "is_number", False) and elements <= PERSISTENT:
                return True
            return bool(original(features, cooperative_reduction))

    return Choices()
