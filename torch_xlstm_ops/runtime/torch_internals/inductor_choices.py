"""What Inductor decides: its options, and two of its heuristics that are changed while a function is compiled."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

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


MOST_JOINED = "max_pointwise_cat_inputs"  # which rules simple tensors alone before torch 2.13


def _as_inductor_joins(most: int | None) -> AbstractContextManager[object]:
    return nullcontext()


@need(_as_inductor_joins, where=(
        "torch._inductor.lowering.lowerings", "torch._inductor.ir.ConcatKernel.create",
        "torch._inductor.ir.TensorBox",
    ),
      without="a chunk of the sLSTM parallel in time is two CUDA kernels instead of one")
def joined_in_place(most: int | None) -> AbstractContextManager[object]:
    """Have Inductor join more than `most` tensors by writing each to its place, where it has no option for that.

    All tensors must have the same dtype.
    """
    from torch._inductor import config, ir, lowering

    if most is None or "max_complex_pointwise_cat_inputs" in config.get_config_copy():
        return nullcontext()
    cat = torch.ops.aten.cat.default
    lowered = lowering.lowerings[cat]

    def join(tensors: Sequence[Any], dim: int = 0) -> Any:
        if len(tensors) <= most:
            return lowered(tensors, dim)
        return ir.TensorBox(ir.ConcatKernel.create(tensors, dim % len(tensors[0].get_size())))

    return _instead(lowering.lowerings, cat, join)


@contextmanager
def _instead(table: MutableMapping[Any, Any], key: Any, value: Any) -> Iterator[None]:
    before, table[key] = table[key], value
    try:
        yield
    finally:
        table[key] = before


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
