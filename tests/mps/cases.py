"""The one table: which functions and ops run on the emulated device, what they may submit, how exact they must be."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_xlstm_ops import mlstm, mlstm_gradient

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
STATIC = {"eps": 1e-6}
MAX_BUFFERS = 30  # Metal allows 31; Inductor's error reporting can add one
MAX_GROUP = 1024

# Not multiples of Metal's 32 lanes, and more than 1,024 elements a state, so that reductions have every form.
SIZES = {"B": 2, "NH": 2, "G": 4, "NC": 3, "L": 64, "DHQK": 40, "DHHV": 72}
STREAMS = ("q", "k", "v", "igate", "fgate", "dh")  # in the stream's dtype; every other argument in the states'
GATES = {
    "usual": lambda igate, fgate: (igate, fgate + 3),
    "spread": lambda igate, fgate: (igate * 10, fgate * 10),
    "closing": lambda igate, fgate: (igate, fgate - 40),
    "padded": lambda igate, fgate: (_last_tokens(igate, -torch.inf), _last_tokens(fgate, torch.inf)),
}


class Function(NamedTuple):
    """A function that Inductor compiles, with the axes and the names of its tensor arguments."""

    fn: Callable[..., Any]
    axes: tuple[str, ...]
    names: tuple[str, ...]
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
    "mlstm.step": Expected(STEP, {}),
    "mlstm.step_": Expected(STEP, {}),
    "mlstm.operands": Expected(SEGMENT, {"aten::bmm.out": 3}),
    "mlstm_gradient.gradient": Expected(BACKWARD, {"aten::bmm.out": 15}),
    "mlstm.summarize": Expected(SEGMENT, {"aten::bmm.out": 1}),
    "mlstm.absorb": Expected(SEGMENT, {}),
    "mlstm.after": Expected(SEGMENT, {"aten::bmm.out": 1}),
    "slstm.step": Expected(STEP, {}),
    "slstm.block_": Expected(STEP, {}, per_token=True),
    "slstm.replay_": Expected(BACKWARD, {}),
    "slstm.block_backward_": Expected(BACKWARD, {}),
}
# What an op may ask of ATen beside what its compiled functions ask: products, fresh states, padding, copies into place.
PLUMBING = {"aten::zero_", "aten::fill_.Scalar", "aten::copy_"}
OP_ATEN = {
    "mlstm_step": set[str](),
    "mlstm_step_": PLUMBING,
    "mlstm_chunkwise": PLUMBING | {"aten::bmm", "aten::bmm.out", "aten::baddbmm_"},
    "slstm_step": set[str](),
    "slstm_sequence": PLUMBING,
    "slstm_sequence_backward": PLUMBING | {
        "aten::bmm", "aten::bmm.out", "aten::cat", "aten::add.Tensor", "aten::mul.Tensor", "aten::sum.dim_IntList",
        "aten::where.self",
    },
}
# Debts, each to be paid: what launches more than its budget, and what reads lanes of a SIMD group that do not exist.
OVER_BUDGET = {"mlstm.operands", "mlstm_gradient.gradient"}
READS_ABSENT_LANES = {"mlstm_gradient.gradient"}


def functions() -> dict[str, Function]:
    """Return what the ops compile, by ``module.function``: all that the maths lists in its tables AXES."""
    found = {}
    for module in (mlstm, mlstm_gradient):
        for fn, axes in module.AXES.items():
            parameters = inspect.signature(fn).parameters
            static = {name: STATIC[name] for name in parameters if name in STATIC}
            key = f"{module.__name__.rsplit('.', 1)[-1]}.{fn.__name__}"
            found[key] = Function(fn, tuple(axes), tuple(parameters)[: len(axes)], static)
    return found


def arguments(function: Function, dtype: torch.dtype, gates: str, sizes: dict[str, int]) -> list[Tensor]:
    """Return tensors on the CPU for a function, rounded to the dtypes that an op would pass."""
    generator = torch.Generator().manual_seed(0)
    values = {}
    for name, axes in zip(function.names, function.axes, strict=True):
        values[name] = torch.randn([int(a) if a.isdigit() else sizes[a] for a in axes.split()], generator=generator)
    if "fgate" in values:
        values["igate"], values["fgate"] = GATES[gates](values["igate"], values["fgate"])
    return [value.to(dtype if name in STREAMS else torch.float32) for name, value in values.items()]


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
        result = model(ids[:, :tokens], use_cache=True)
        found = [result.logits]
        for t in range(tokens, ids.shape[1]):
            result = model(ids[:, t : t + 1], cache_params=result.cache_params, use_cache=True)
            found.append(result.logits)
    return torch.cat(found, 1)


def _last_tokens(gate: Tensor, value: float) -> Tensor:
    gate = gate.clone()
    gate[..., -min(5, gate.shape[-1]):] = value
    return gate
