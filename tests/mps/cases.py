"""The functions and ops that run on the emulated device, with the kernels and ATen calls that each may submit."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_xlstm_ops.kernels.slstm import DEFAULTS
from torch_xlstm_ops.maths import mlstm, slstm
from torch_xlstm_ops.maths.slstm import Product
from torch_xlstm_ops.models import transformers as adapter

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
STATIC = {"eps": 1e-6, "floor": 0.0}
MAX_BUFFERS = 30  # Metal allows 31; Inductor's error reporting can add one
MAX_GROUP = 1024

# Not multiples of Metal's 32 lanes, and more than 1,024 elements a state, so that reductions have every form.
SIZES = {"B": 2, "NH": 2, "G": 4, "NC": 3, "L": 64, "DHQK": 40, "DHHV": 72}
SLSTM_SIZES = {"G": 3, "NH": 2, "DH": 40, "K": 40, "N": 160}
_LENGTHS = DEFAULTS["mps"].lengths
STEPS = {slstm.step: 1, slstm.activate_: 1, slstm.block_: _LENGTHS.block, slstm.replay_: _LENGTHS.replay,
         slstm.block_backward_: _LENGTHS.backward}  # of a call
VARIANTS = {  # of an sLSTM's loops: how they multiply, and whether rows are reset
    "": (Product.FUSED, False), " with resets": (Product.FUSED, True), " with products": (Product.MATMUL, True),
}
# In the stream's dtype; every other argument is in the states'.
STREAMS = {"mlstm": ("q", "k", "v", "igate", "fgate", "dh"), "slstm": ("x", "r", "b", "h_before", "h")}
# What an argument of sLSTM's functions can be: cells that are in use, factors no larger than 1.
RANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "r": lambda t: t * SLSTM_SIZES["DH"] ** -0.5,
    "reset": lambda t: t > 0,
    **dict.fromkeys(("n", "n_before"), lambda t: t.abs() + 1),
    **dict.fromkeys(("keep", "add", "o", "not_f"), torch.sigmoid),
    "z": torch.tanh, "log_f": torch.nn.functional.logsigmoid,
}
GATES = {
    "usual": lambda igate, fgate: (igate, fgate + 3),
    "spread": lambda igate, fgate: (igate * 10, fgate * 10),
    "closing": lambda igate, fgate: (igate, fgate - 40),
    "padded": lambda igate, fgate: (_last_tokens(igate, -torch.inf), _last_tokens(fgate, torch.inf)),
}


class Function(NamedTuple):
    """A function that Inductor compiles, with the axes and the names of its tensor arguments.

    streams: the names of the arguments that are in the stream's dtype.
    """

    fn: Callable[..., Any]
    axes: tuple[str, ...]
    names: tuple[str, ...]
    streams: tuple[str, ...]
    sizes: dict[str, int]
    static: dict[str, Any]


class Expected(NamedTuple):
    """What one call of a compiled function may submit: at most so many kernels, exactly these ATen calls.

    per_token: whether `kernels` is for each of the call's T tokens.
    """

    kernels: int
    aten: dict[str, int]
    per_token: bool = False


STEP, SEGMENT, BACKWARD = 2, 10, 30  # Metal kernels a call may launch
SEGMENT_ATEN = 7
EXPECTED = {
    "mlstm.advance": Expected(STEP, {}),
    "mlstm.step_": Expected(STEP, {}),
    "mlstm.segment_factors": Expected(SEGMENT, {"aten::bmm.out": 2}),
    "mlstm.segment_factors_single_chunk": Expected(SEGMENT, {"aten::bmm.out": 1}),
    "mlstm.factors_from_summary": Expected(SEGMENT, {"aten::bmm.out": 1}),
    "mlstm.gradient_": Expected(BACKWARD, {"aten::bmm.out": 11}),
    "mlstm.chunked": Expected(3, {}),
    "mlstm.summarize": Expected(SEGMENT, {"aten::bmm.out": 1}),
    "mlstm.absorb": Expected(SEGMENT, {}),
    "mlstm.final_state": Expected(SEGMENT, {"aten::bmm.out": 1}),
    "slstm.step": Expected(STEP, {}),
    "slstm.block_": Expected(STEP, {}, per_token=True),
    "slstm.block_ with resets": Expected(STEP, {}, per_token=True),
    "slstm.block_ with products": Expected(STEP, {"aten::bmm.out": 4}, per_token=True),
    "slstm.activate_": Expected(4, {}),  # of all tokens at once
    "slstm.replay_": Expected(STEP, {}, per_token=True),
    "slstm.replay_ with resets": Expected(STEP, {}, per_token=True),
    "slstm.block_backward_": Expected(STEP, {}, per_token=True),
    "slstm.block_backward_ with resets": Expected(STEP, {}, per_token=True),
    "slstm.block_backward_ with products": Expected(STEP, {"aten::bmm.out": 1}, per_token=True),
}
# What an op may ask of ATen beside what its compiled functions ask: products, fresh states, padding, copies into place.
PLUMBING = {"aten::zero_", "aten::fill_.Scalar", "aten::copy_"}
OP_ATEN = {
    "mlstm_step": set[str](),
    "mlstm_step_": PLUMBING,
    "mlstm_chunkwise": PLUMBING | {"aten::bmm", "aten::bmm.out", "aten::baddbmm_"},
    "slstm_step": set[str](),
    "slstm_sequence": PLUMBING | {"aten::bmm.out"},
    "slstm_sequence_backward": PLUMBING | {
        "aten::bmm", "aten::bmm.out", "aten::cat", "aten::add.Tensor", "aten::mul.Tensor", "aten::sum.dim_IntList",
        "aten::where.self", "aten::eq.Scalar", "aten::all.dim",  # with resets: which documents the loss looks at
    },
}
# Known excess: the kernels of functions that exceed their budget, by dtype.
OVER_BUDGET = {
    "mlstm.segment_factors": {"float32": 11, "bfloat16": 11, "float16": 12},
    "slstm.block_backward_ with resets": {"float32": 3, "bfloat16": 2, "float16": 2},
    "slstm.block_backward_ with products": {"float32": 4, "bfloat16": 3, "float16": 3},
}
# A bfloat16 segment's kernels and ATen calls: mlstm.segment_factors has one kernel too many, and two copies convert q
# and k to float32 for their scores (float32 has no copy, and 7 calls).
SEGMENT_EXCESS = 11, 9


def functions() -> dict[str, Function]:
    """Return what the ops compile, by ``module.function``: all that the maths lists in its tables AXES for this device.

    An sLSTM's loops come as sums, with a mask beside, and as products with a mask.
    """
    elsewhere = () if mlstm.prefers_zero_state("mps") else (mlstm.segment_factors_zero_state, mlstm.final_state_)
    found = {f"mlstm.{fn.__name__}": _function(fn, axes, "mlstm", SIZES, {})
             for fn, axes in mlstm.AXES.items() if fn not in elsewhere}
    for fn in slstm.AXES:
        parameters, sizes = inspect.signature(fn).parameters, {**SLSTM_SIZES, "T": STEPS[fn]}
        for variant, (product, reset) in VARIANTS.items():
            loops = fn not in (slstm.step, slstm.activate_)
            if variant and (not loops or (product is Product.MATMUL and "product" not in parameters)):
                continue
            axes = slstm.axes(fn, product, reset)
            found[f"slstm.{fn.__name__}{variant}"] = _function(fn, axes, "slstm", sizes, {"product": product})
    return found


def _function(
    fn: Callable[..., Any], axes: tuple[str, ...], kind: str, sizes: dict[str, int], more: dict[str, Any]
) -> Function:
    parameters = inspect.signature(fn).parameters
    static = {name: value for name, value in (STATIC | more).items() if name in parameters}
    names = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    streams = STREAMS[kind]
    if "gradients" in parameters:  # of the gates after the block, of the state, to be found, and perhaps a mask
        gates = tuple(f"{when} {gate}" for when in ("after", "found") for gate in "ifzo")
        state, found = ("dc", "dn", "dm"), ("dc_before", "dn_before", "dm_before")
        names += [*gates[:4], *state, *gates[4:], *found, "reset"]
        streams += gates
    if static.get("product") is Product.MATMUL:  # which CUDA alone has with a wider result
        streams = tuple(name for name in streams if name != "r")
    return Function(fn, tuple(axes), tuple(names[: len(axes)]), streams, sizes, static)


def arguments(function: Function, dtype: torch.dtype, gates: str) -> list[Tensor]:
    """Return tensors on the CPU for a function, rounded to the dtypes that an op would pass."""
    generator = torch.Generator().manual_seed(0)
    values = {}
    for name, axes in zip(function.names, function.axes, strict=True):
        size = [int(a) if a.isdigit() else function.sizes[a] for a in axes.split()]
        if name == "reset" and "after i" in function.names:
            size[0] += 1  # the token after the block too
        values[name] = torch.randn(size, generator=generator)
    if "fgate" in values:
        values["igate"], values["fgate"] = GATES[gates](values["igate"], values["fgate"])
    if function.streams[0] == "x":
        values = {name: RANGES.get(name, torch.clone)(value) for name, value in values.items()}
    return [value if value.dtype == torch.bool else value.to(dtype if name in function.streams else torch.float32)
            for name, value in values.items()]


def xlstm_model() -> Any:
    """Return a small transformers model whose gates depend on the token."""
    import transformers

    torch.manual_seed(0)
    model = transformers.xLSTMForCausalLM(transformers.xLSTMConfig(
        vocab_size=61, hidden_size=64, num_hidden_layers=2, num_heads=2, qk_dim_factor=1.0, pad_token_id=0,
        bos_token_id=0, eos_token_id=None,
    )).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate_preact.weight" in name:
                parameter.normal_(std=0.3)
    return model


def logits(model: Any, ids: Tensor, tokens: int) -> Tensor:
    """Return the logits of a prompt of `tokens` and of the rest of `ids` fed one by one."""
    with torch.no_grad():
        result = adapter.forward(model, ids[:, :tokens])
        found = [result.logits]
        for t in range(tokens, ids.shape[1]):
            result = adapter.forward(model, ids[:, t : t + 1], result.cache)
            found.append(result.logits)
    return torch.cat(found, 1)


def _last_tokens(gate: Tensor, value: float) -> Tensor:
    gate = gate.clone()
    gate[..., -min(5, gate.shape[-1]):] = value
    return gate
