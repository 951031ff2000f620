"""The one table: which functions and ops run on the emulated device, what they may submit, how exact they must be."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_xlstm_ops import mlstm

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
    """What one call of a compiled function may submit: at most so many kernels, exactly these ATen calls."""

    kernels: int
    aten: dict[str, int]


STEP, SEGMENT, BACKWARD = 2, 10, 30  # Metal kernels a call may launch
SEGMENT_ATEN = 7
EXPECTED = {
    "mlstm.step": Expected(STEP, {}),
    "mlstm.step_": Expected(STEP, {}),
    "mlstm.operands": Expected(SEGMENT, {"aten::bmm.out": 4}),
    "mlstm.segment_backward": Expected(BACKWARD, {"aten::bmm.out": 16}),
    "mlstm.summarize": Expected(SEGMENT, {"aten::bmm.out": 1}),
    "mlstm.absorb": Expected(STEP, {}),
    "mlstm.after": Expected(SEGMENT, {"aten::bmm.out": 1}),
}
# Debts, each to be paid: what launches more than its budget, and what reads lanes of a SIMD group that do not exist.
OVER_BUDGET = {"mlstm.step", "mlstm.step_", "mlstm.operands", "mlstm.segment_backward", "mlstm.absorb"}
READS_ABSENT_LANES = {"mlstm.segment_backward"}


def functions() -> dict[str, Function]:
    """Return what the ops compile, by ``module.function``: all that the maths lists in its tables AXES."""
    found = {}
    for module in (mlstm,):
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


class Operation(NamedTuple):
    """One way to call an op: tokens, schedule, configuration, with a state or without, with its gradient or without."""

    op: str
    tokens: int = 0
    schedule: str = "inductor"
    config: Mapping[str, Any] = MappingProxyType({})
    state: bool = False
    gradient: bool = False
    quick: str = "bfloat16"  # the dtype of the default run; the others are slow
    rows: tuple[int, int] = (2, 2)
    DHQK: int = 40
    DHHV: int = 72
    chunk_size: int = 64

    def arguments(self, dtype: torch.dtype) -> list[Tensor]:
        """Return q, k, v, igate, fgate and, with a state, c, n, m, on the CPU."""
        generator = torch.Generator().manual_seed(0)
        step = self.op.startswith("mlstm_step")
        S, gate = ((), (1,)) if step else ((self.tokens,), (self.tokens,))
        shapes: list[tuple[int, ...]] = [(*S, self.DHQK), (*S, self.DHQK), (*S, self.DHHV), gate, gate]
        streams = [torch.randn(*self.rows, *shape, generator=generator) for shape in shapes]
        streams[4] += 3
        states = [torch.randn(*self.rows, *shape, generator=generator)
                  for shape in ((self.DHQK, self.DHHV), (self.DHQK,), (1,))]
        return [t.to(dtype) for t in streams] + (states if self.state or step else [])

    def gradients(self, args: list[Tensor]) -> list[Tensor]:
        """Return what to put into the backward pass: one tensor for each result, or nothing."""
        if not self.gradient:
            return []
        generator = torch.Generator().manual_seed(1)
        shapes = ((self.tokens, self.DHHV), (self.DHQK, self.DHHV), (self.DHQK,), (1,))
        dh, *dstate = [torch.randn(*self.rows, *shape, generator=generator) for shape in shapes]
        return [dh.to(args[2].dtype), *dstate]

    def call(self, args: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        """Call the op; return its results and the states it wrote, or the gradients of its arguments."""
        op = getattr(torch.ops.xlstm, self.op)
        if self.op == "mlstm_step_":
            states = [t.clone() for t in args[5:]]
            return [op(*args[:5], *states), *states]
        if self.op == "mlstm_step":
            return list(op(*args))
        how = {"chunk_size": self.chunk_size, "schedule": self.schedule}
        return self._results(lambda *given: op(*given, **how), args, gradients)

    def oracle(self, args: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        """Return what `call` has to return, by the recurrence."""
        if self.op != "mlstm_chunkwise":
            return list(mlstm.step(*args, **STATIC))
        return self._results(lambda *given: mlstm.recurrent(*given, **STATIC), self._with_state(args), gradients)

    def eager(self, args: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        """Return what plain eager products in the arguments' dtype give on the CPU."""
        if self.op != "mlstm_chunkwise":
            return list(mlstm.step(*args, **STATIC))
        return self._results(self._segment, self._with_state(args), gradients)

    def _results(self, run: Callable[..., Any], args: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        if not gradients:
            return list(run(*args))
        inputs = [t.detach().requires_grad_() for t in args]
        return list(torch.autograd.grad(run(*inputs), inputs, gradients))

    def _with_state(self, args: list[Tensor]) -> list[Tensor]:
        if self.state:
            return args
        wide = torch.float64 if args[0].dtype == torch.float64 else torch.float32
        shapes = ((self.DHQK, self.DHHV), (self.DHQK,), (1,))
        return [*args, *(torch.zeros(*self.rows, *shape, dtype=wide) for shape in shapes)]

    def _segment(self, *args: Tensor) -> list[Tensor]:
        """Run the whole sequence as one eager segment, padded to whole chunks."""
        L = self.chunk_size
        missing = -self.tokens % L
        rows = []
        for t, value in zip(args[:5], PADDING, strict=True):
            padded = torch.cat([t, t.new_full((*t.shape[:2], missing, *t.shape[3:]), value)], 2)
            rows.append(padded.flatten(0, 1).unflatten(1, (-1, L)))
        h, *state = mlstm.segment(*rows, *(t.flatten(0, 1) for t in args[5:]), **STATIC)
        h = h.flatten(1, 2)[:, : self.tokens].unflatten(0, self.rows)
        return [h, *(t.unflatten(0, self.rows) for t in state)]


PADDING = (0.0, 0.0, 0.0, -torch.inf, torch.inf)
TWO_SEGMENTS = {"segment": 128, "heads_per_band": 3}
OPERATIONS = {
    "step": Operation("mlstm_step"),
    "step in place": Operation("mlstm_step_"),
    "one segment": Operation("mlstm_chunkwise", 128),
    "tail": Operation("mlstm_chunkwise", 150, quick="float16"),
    "one token": Operation("mlstm_chunkwise", 1, state=True),
    "bands and segments": Operation("mlstm_chunkwise", 300, config=TWO_SEGMENTS, state=True, quick="float32"),
    "queued": Operation("mlstm_chunkwise", 300, "queued", config=TWO_SEGMENTS, state=True),
    "recurrent": Operation("mlstm_chunkwise", 5, "recurrent", state=True),
    "gradient": Operation("mlstm_chunkwise", 150, gradient=True, state=True),
    "gradient over segments": Operation(
        "mlstm_chunkwise", 300, config=TWO_SEGMENTS, gradient=True, state=True, quick="float32"
    ),
}
# What an op may ask of ATen around its compiled functions: products, fresh states, padding, copies into place.
OP_ATEN = {"aten::bmm", "aten::bmm.out", "aten::baddbmm_", "aten::zero_", "aten::fill_.Scalar", "aten::copy_"}


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
