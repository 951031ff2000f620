"""The identity of a transformers xLSTM: a hash of its config, its weights and the dtype of its states."""

from __future__ import annotations

import hashlib
import json
import weakref
from typing import Any

import torch
from torch import Tensor

from torch_xlstm_ops.models import transformers as adapter

# Entries of a transformers config that change no number.
_IGNORED = frozenset(("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache",
                      "mode", "return_last_states", "output_hidden_states", "output_attentions", "return_dict"))

_known: weakref.WeakKeyDictionary[Any, tuple[object, str]] = weakref.WeakKeyDictionary()


def identity(model: Any) -> str:
    """Return a hash of a model's config and weights, and of the dtype of its states, which a patch may change.

    It is computed once, and again after a weight was written.
    """
    weights = model.state_dict(keep_vars=True)
    dtype = adapter.layers(adapter.empty_cache(model, device="meta"))[0][0].dtype
    versions = (dtype, *((tensor.data_ptr(), None if tensor.is_inference() else tensor._version)
                         for tensor in weights.values()))
    known = _known.get(model)
    if known is None or known[0] != versions:
        known = _known[model] = (versions, _hash(model.config.to_dict(), weights, dtype))
    return known[1]


def _hash(config: dict[str, Any], weights: dict[str, Tensor], dtype: torch.dtype) -> str:
    found = hashlib.blake2b(digest_size=16)
    kept = {name: value for name, value in config.items() if name not in _IGNORED}
    found.update(json.dumps([kept, str(dtype)], sort_keys=True, default=str).encode())
    for name, tensor in weights.items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(raw_bytes(tensor))
    return found.hexdigest()


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes as they are in memory, in row-major order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]
