"""The functions of other packages that the Dynamo backend replaces, and the conditions under which it does."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from torch_xlstm_ops.maths.shapes import STREAM_DTYPES, dtype_name
from torch_xlstm_ops.patch import upstream_functions as functions

TensorInfo = tuple[torch.dtype, int] | None  # dtype and rank of an argument; None if no tensor was given


class Rule(NamedTuple):
    """One function of another package, and the adapter that replaces it."""

    module: str  # that defines it
    function: str
    adapter: Callable[[Sequence[Any], Mapping[str, Any]], Any]
    tensors: str  # names of the tensors that the adapter takes, in its order
    ranks: tuple[int, ...]
    streams: int  # how many of them must share a dtype; the others must be floating
    conditions: tuple[str, ...] = ()  # other arguments that `refusal` checks

    @property
    def place(self) -> str:
        """Return the qualified name of the function."""
        return f"{self.module}.{self.function}"


_HF, _HF_STREAMS = "transformers.models.xlstm.modeling_xlstm", "query key value igate fgate"
_MK, _MK_STREAMS = "mlstm_kernels.torch", "q k v i f"
_INITIAL = " c_initial n_initial m_initial"
_BLOCKS, _CELL = "xlstm.blocks.mlstm.backends", "xlstm.blocks.slstm.src.vanilla"
_GATES = "igate_preact fgate_preact"


def _sequence(module: str, function: str, streams: str, *conditions: str) -> Rule:
    """Return the rule of an mLSTM over (B, NH, S, D), with the state names of transformers and mlstm_kernels."""
    ranks = (4, 4, 4, 3, 3, 4, 3, 3)
    return Rule(module, function, functions.mlstm_sequence, streams + _INITIAL, ranks, 3, ("eps", *conditions))


def _token(module: str, function: str, tensors: str) -> Rule:
    ranks = (3, 3, 3, 3, 3, 4, 3, 3)
    return Rule(module, function, functions.mlstm_token, tensors, ranks, 3, ("eps", "dtype_state"))


def _sigmoid(module: str, function: str) -> Rule:
    """Return the rule of an mLSTM with a sigmoid input gate."""
    return _sequence(module, function, _MK_STREAMS)._replace(adapter=functions.mlstm_sigmoid_sequence)


RULES = (
    _sequence(_HF, "wrap_chunkwise_arbitrary_sequence_length", _HF_STREAMS, "mlstm_chunkwise_kernel"),
    _sequence(_HF, "mlstm_chunkwise_native_autograd", _HF_STREAMS),
    _sequence(_HF, "mlstm_recurrent_sequence_native", _HF_STREAMS, "dtype_state"),
    _token(_HF, "mlstm_recurrent_step_native", _HF_STREAMS + " cstate nstate mstate"),
    _sequence(_MK + ".kernel_wrappers", "wrap_chunkwise__arbitrary_sequence_length", _MK_STREAMS,
              "mlstm_chunkwise_kernel"),
    _sequence(_MK + ".kernel_wrappers", "wrap_chunkwise__arbitrary_sequence_length_with_padding", _MK_STREAMS,
              "mlstm_chunkwise_kernel"),
    _sequence(_MK + ".chunkwise.native.fwbw", "mlstm_chunkwise__native_autograd", _MK_STREAMS),
    _sequence(_MK + ".chunkwise.native.fwbw", "mlstm_chunkwise__native_custbw", _MK_STREAMS),
    _sequence(_MK + ".chunkwise.triton_xl_chunk.fwbw", "mlstm_chunkwise__xl_chunk", _MK_STREAMS),
    _sequence(_MK + ".chunkwise.triton_limit_chunk.fwbw", "mlstm_chunkwise__limit_chunk", _MK_STREAMS),
    _sequence(_MK + ".parallel.triton_limit_headdim.fwbw", "mlstm_parallel__limit_headdim", _MK_STREAMS),
    _sigmoid(_MK + ".chunkwise.triton_xl_chunk_siging.fwbw", "mlstm_siging_chunkwise__xl_chunk"),
    _sigmoid(_MK + ".parallel.native_siging.fwbw", "mlstm_siging_parallel__native_autograd"),
    _sigmoid(_MK + ".parallel.native_siging.fwbw", "mlstm_siging_parallel__native_custbw"),
    _sequence(_MK + ".recurrent.native_sequence", "mlstm_recurrent_sequence__native_fw", _MK_STREAMS, "dtype_state"),
    _token(_MK + ".recurrent.native_step", "mlstm_recurrent_step__native", _MK_STREAMS + " c n m"),
    _token(_MK + ".recurrent.triton_step", "mlstm_recurrent_step__triton", _MK_STREAMS + " c n m"),
    Rule(_BLOCKS, "parallel_stabilized_simple", functions.xlstm_parallel, "queries keys values " + _GATES, (4,) * 5, 3,
         ("eps", "stabilize_rowwise")),
    Rule(_BLOCKS, "recurrent_step_stabilized_simple", functions.xlstm_token, f"q k v {_GATES} c_state n_state m_state",
         (4,) * 8, 3, ("eps",)),
    Rule(_CELL, "slstm_forward", functions.xlstm_slstm, "x R b states", (3, 3, 1, 3), 2, ("pointwise_forward",)),
    Rule(_CELL, "slstm_forward_step", functions.xlstm_slstm_token, "x R b states", (3, 3, 1, 3), 2,
         ("pointwise_forward",)),
    Rule("flashrnn.flashrnn.vanilla", "flashrnn_forward", functions.flashrnn, "Wx R b states", (5, 4, 3, 5), 2,
         ("pointwise_forward",)),
)


def refusal(rule: Rule, infos: Sequence[TensorInfo], conditions: Mapping[str, Any]) -> str | None:
    """Return why the operator cannot replace a call, or None if it can.

    infos: of the rule's tensors; conditions: values of the arguments in `rule.conditions`.
    """
    names = rule.tensors.split()
    stream = infos[0]
    for name, info, rank in zip(names, infos, rule.ranks, strict=True):
        if info is not None and info[1] != rank:
            return f"{name} must have {rank} axes, got {info[1]}"
        if info is not None and not info[0].is_floating_point:
            return f"{name} must have a floating dtype, got {dtype_name(info[0])}"
    found = [info[0] if info is not None else None for info in infos[:rule.streams]]
    if found[0] not in STREAM_DTYPES or any(dtype != found[0] for dtype in found):
        dtypes = ", ".join("None" if dtype is None else dtype_name(dtype) for dtype in found)
        return (f"{', '.join(names[:rule.streams])} must share one of float32, float16, bfloat16 and float64, got "
                f"{dtypes}")
    eps = conditions.get("eps", 0.0)
    if not isinstance(eps, (float, int)) or not eps >= 0:
        return f"eps must be a number of at least 0, got {eps}"
    if conditions.get("dtype_state") == torch.float64 and stream is not None and stream[0] != torch.float64:
        return f"dtype_state must be at most float32 beside {dtype_name(stream[0])}, got float64"
    if not conditions.get("stabilize_rowwise", True):
        return "stabilize_rowwise must be True, got False"
    return _other_recurrence(conditions.get("mlstm_chunkwise_kernel"), conditions.get("pointwise_forward"))


def sigmoid_gate(kernel: Any) -> bool | None:
    """Return whether a chunkwise kernel with a sigmoid input gate normalises h, or None for one with another gate."""
    options: Mapping[str, Any] = {}
    while isinstance(kernel, functools.partial):
        options, kernel = {**kernel.keywords, **options}, kernel.func
    if "siging" not in getattr(kernel, "__name__", ""):
        return None
    return bool(options.get("normalize", True))


def _other_recurrence(kernel: Any, pointwise: Any) -> str | None:
    """Return why an argument selects another recurrence, or None."""
    while isinstance(kernel, functools.partial):
        kernel = kernel.func
    if sigmoid_gate(kernel) is not None and not kernel.__module__.startswith("mlstm_kernels."):
        return f"a kernel with a sigmoid input gate must be mlstm_kernels', got {kernel.__module__}.{kernel.__name__}"
    if pointwise is not None and not pointwise.__module__.endswith(".slstm"):
        return f"pointwise_forward must be the sLSTM's, got that of {pointwise.__module__}"
    return None
