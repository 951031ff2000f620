"""Weights of transformers' and xlstm_large's models by the names of our blocks, which are theirs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def of(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the arguments of `xLSTM` for a model, and its weights by our names. Raises ValueError for another model.
    """
    stack = getattr(model, "backbone", model)
    blocks, config = getattr(stack, "blocks", None), getattr(stack, "config", None)
    if blocks is None or config is None or not len(blocks) or not hasattr(blocks[0], "mlstm_layer"):
        raise ValueError("model must be an xLSTM of transformers or of xlstm.xlstm_large, "
                         f"got {type(model).__name__}")
    found = {name: value.detach() for name, value in stack.state_dict().items()
             if name.startswith(("blocks.", "out_norm."))}
    for name in list(found):
        _split(found, name, config.num_heads)
    first = {name.removeprefix("blocks.0."): value for name, value in found.items() if name.startswith("blocks.0.")}
    H = first["mlstm_layer.q.weight"].shape[1]
    return {
        "input_size": H, "hidden_size": H, "num_layers": len(blocks), "num_heads": config.num_heads,
        "bias": "mlstm_layer.q.bias" in first, "qk_dim": len(first["mlstm_layer.q.weight"]),
        "v_dim": len(first["mlstm_layer.v.weight"]), "ffn_dim": len(first["ffn.proj_up.weight"]),
        "norm_eps": config.norm_eps, "eps": config.eps, "soft_cap": config.gate_soft_cap,
        "out_norm": "out_norm.weight" in found,
    }, found


def _split(found: dict[str, Tensor], name: str, heads: int) -> None:
    """Replace a fused weight by its parts."""
    prefix, _, kind = name.rpartition(".")
    place, _, layer = prefix.rpartition(".")
    value = found[name]
    if layer == "qkv_opreact":
        v = len(found[f"{place}.multihead_norm.weight"])
        qk = (len(value) - 2 * v) // 2
        sizes = {"q": qk, "k": qk, "v": v, "ogate_preact": v}
    elif layer == "ifgate_preact":
        sizes = {"igate_preact": heads, "fgate_preact": heads}
    elif layer == "proj_up_gate_z":
        sizes = {"proj_up_gate": len(value) // 2, "proj_up": len(value) // 2}
    else:
        return
    del found[name]
    for part, tensor in zip(sizes, torch.split(value, list(sizes.values())), strict=True):
        found[f"{place}.{part}.{kind}"] = tensor
