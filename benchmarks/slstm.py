"""Time our sLSTM against xlstm's and flashrnn's: a sequence forward, forward and backward, and one step.

    python -m benchmarks.slstm --json result.json                                # this machine's first device
    python -m benchmarks.slstm --device cuda --shapes 8,4,64,1024 8,4,128,1024   # B,NH,DH,S

Every contender is compared with the float64 recurrence before it is timed; one that is missing or wrong is reported
with the reason. The others take turns call by call, so that other load of the machine affects all of them. On CUDA ours
also runs step by step, that without graphs and with the other product by R, and parallel in time, to show the effect of
each; `auto` is parallel here, as what that needs is compiled.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.timing import alternate, machine, save, timed
from torch_xlstm_ops.api import slstm_sequence, slstm_step
from torch_xlstm_ops.kernels.slstm import DEFAULTS
from torch_xlstm_ops.maths import slstm
from torch_xlstm_ops.maths.shapes import dtype_name
from torch_xlstm_ops.ops.slstm import sequence
from torch_xlstm_ops.runtime import devices
from torch_xlstm_ops.runtime.cuda_graphs import CudaGraphs

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}  # relative, in the Euclidean norm
GRADIENT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 6e-2, torch.float16: 2e-2}
SHAPES = {"cpu": ["4,4,64,256"], "cuda": ["8,4,64,1024", "8,4,128,1024", "8,3,256,1024", "1,4,64,1024"],
          "mps": ["8,4,64,1024"]}
OURS, STEPS, PARALLEL = "ours", "ours sequential", "ours parallel in time"

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]  # x (B, S, 4, NH, DH), r, b -> h (B, S, NH, DH)


class Shape(NamedTuple):
    """The sizes of one case."""

    B: int
    NH: int
    DH: int
    S: int


class Contender(NamedTuple):
    """A way to run a sequence, and a context manager for its forward and backward pass."""

    forward: Forward
    during: Callable[[], AbstractContextManager[None]] = nullcontext


def ours(x: Tensor, r: Tensor, b: Tensor, schedule: str | None = None) -> Tensor:
    return slstm_sequence(x, r, b, schedule=schedule)[0]


@contextmanager
def operators_with(graphs: CudaGraphs, **changes: Any) -> Iterator[None]:
    """Let our operators use other graphs and device defaults."""
    before = sequence.graphs, dict(DEFAULTS)
    sequence.graphs = graphs
    DEFAULTS.update({kind: known._replace(**changes) for kind, known in before[1].items()})
    try:
        yield
    finally:
        sequence.graphs = before[0]
        DEFAULTS.update(before[1])


def xlstm_vanilla(x: Tensor, r: Tensor, b: Tensor) -> Tensor:
    from xlstm.blocks.slstm.src.vanilla import slstm_forward, slstm_pointwise_function_registry

    B, S, _, NH, DH = x.shape
    states = x.new_zeros(4, B, NH * DH)
    rows = r.transpose(0, 1).reshape(NH, 4 * DH, DH)
    cell = slstm_pointwise_function_registry["slstm"]
    every, _, _ = slstm_forward(x.transpose(0, 1).reshape(S, B, -1), states, rows, b.to(x.dtype).reshape(-1), cell)
    return every[0, 1:].transpose(0, 1).view(B, S, NH, DH)  # type: ignore[no-any-return]


def flashrnn(backend: str) -> Forward:
    def forward(x: Tensor, r: Tensor, b: Tensor) -> Tensor:
        import flashrnn

        dtype = dtype_name(x.dtype)
        bias = b.to(x.dtype)
        h, _ = flashrnn.flashrnn(x, r, bias, function="slstm", backend=backend, dtype=dtype)
        return h[0]  # type: ignore[no-any-return]

    return forward


def contenders(device: torch.device) -> dict[str, Contender]:
    """Return the contenders for a type of device."""
    some = {"xlstm vanilla": Contender(xlstm_vanilla), "flashrnn vanilla": Contender(flashrnn("vanilla"))}
    if device.type == "cuda":
        without, by_matmul = CudaGraphs(capacity=0), CudaGraphs()
        some |= {f"flashrnn {name}": Contender(flashrnn(name)) for name in ("cuda", "triton_fused")}
        steps = partial(ours, schedule="sequential")
        some[STEPS] = Contender(steps)
        some[f"{STEPS} without graphs"] = Contender(steps, lambda: operators_with(without))
        some[f"{STEPS} by matmul"] = Contender(steps, lambda: operators_with(by_matmul, fused_bytes=0))
        some[PARALLEL] = Contender(partial(ours, schedule="parallel"))
    return {OURS: Contender(ours), **some}


def draw(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, r, b; forget gates are mostly open, as in trained models."""
    g = torch.Generator().manual_seed(0)
    B, NH, DH, S = shape
    x = torch.randn(B, S, 4, NH, DH, generator=g)
    r = torch.randn(4, NH, DH, DH, generator=g) * 0.5 * DH**-0.5
    b = torch.randn(4, NH, DH, generator=g)
    b[1] += 3
    return x.to(device, dtype), r.to(device, dtype), b.to(device)


def wide(t: Tensor) -> Tensor:
    """Return `t` in float64, on the CPU for MPS, which has none."""
    return (t.cpu() if t.device.type == "mps" else t).detach().double()


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((wide(found) - wanted).norm() / wanted.norm())


def reference(args: Sequence[Tensor], dh: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
    """Return h and the gradients of x, r, b by the recurrence in float64."""
    leaves = [wide(t).requires_grad_() for t in args]
    x, r, b = leaves
    zeros = x.new_zeros(x.shape[0], *x.shape[3:])
    h = slstm.recurrent(x, r, b, zeros, zeros, zeros, zeros)[0]
    return h.detach(), torch.autograd.grad(h, leaves, wide(dh))


def rejected(
    name: str, contender: Contender, args: Sequence[Tensor], dh: Tensor, wanted: tuple[Tensor, Sequence[Tensor]]
) -> str:
    """Call a contender three times, and return why it is excluded, or None."""
    leaves = [t.detach().requires_grad_() for t in args]
    try:
        with contender.during():
            for _ in range(3):
                h = contender.forward(*leaves)
                gradients = torch.autograd.grad(h, leaves, dh)
            for _ in range(3):
                inference(contender, args)
    except Exception as error:  # a package that cannot be built, or does not take this shape
        if name == OURS:
            raise
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
    dtype = args[0].dtype
    errors = [distance(h.detach(), wanted[0]), *(distance(a, b) for a, b in zip(gradients, wanted[1], strict=True))]
    if errors[0] <= TOLERANCE[dtype] and max(errors[1:]) <= GRADIENT_TOLERANCE[dtype]:
        return ""
    reason = f"relative errors of h, dx, dr, db: {', '.join(f'{e:.1e}' for e in errors)}"
    if name == OURS:
        raise SystemExit(f"ours is wrong: {reason}")
    return reason


def inference(contender: Contender, args: Sequence[Tensor]) -> None:
    with contender.during(), torch.no_grad():
        contender.forward(*args)


def training(contender: Contender, leaves: Sequence[Tensor], dh: Tensor) -> None:
    with contender.during():
        torch.autograd.grad(contender.forward(*leaves), leaves, dh)


def measure(
    shape: Shape, dtype: torch.dtype, device: torch.device, seconds: float, without: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the medians of one case, the step's microseconds, and who was excluded."""
    args = draw(shape, dtype, device)
    dh = torch.randn(shape.B, shape.S, shape.NH, shape.DH, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    wanted = reference(args, dh)
    start, everyone = time.perf_counter(), contenders(device)
    reasons = {OURS: rejected(OURS, everyone[OURS], args, dh, wanted)}
    first_seconds = time.perf_counter() - start
    reasons |= {name: "left out" if name in without else rejected(name, one, args, dh, wanted)
                for name, one in everyone.items() if name != OURS}
    usable = {name: one for name, one in everyone.items() if not reasons[name]}
    leaves = [t.detach().requires_grad_() for t in args]
    forward_ms = alternate({name: partial(inference, one, args) for name, one in usable.items()}, device, seconds)
    both_ms = alternate({name: partial(training, one, leaves, dh) for name, one in usable.items()}, device, seconds)
    return {
        "shape": shape._asdict(),
        "dtype": dtype_name(dtype),
        "ours_first_calls_s": round(first_seconds, 1),
        "forward_ms": forward_ms,
        "forward_backward_ms": both_ms,
        "forward_us_a_step": round(forward_ms[OURS] * 1e3 / shape.S, 2),
        "forward_ratio": ratios(forward_ms),
        "forward_backward_ratio": ratios(both_ms),
        "step_us": round(step_us(args, device), 1),
        "parallel_in_time": reports(usable[PARALLEL], leaves, dh) if PARALLEL in usable else None,
        "no_part": {name: why for name, why in reasons.items() if why},
    }


def reports(contender: Contender, leaves: Sequence[Tensor], dh: Tensor) -> dict[str, dict[str, float]]:
    """Return the rounds, the estimated error and the windows that ran sequentially, forward and backward."""
    inference(contender, leaves)
    forward = sequence.parallel.report._asdict()
    training(contender, leaves, dh)
    return {"forward": forward, "backward": sequence.parallel.report._asdict()}


def ratios(medians: dict[str, float]) -> dict[str, float]:
    """Return the ratios of our time to the others'."""
    return {name: round(medians[OURS] / ms, 4) for name, ms in medians.items() if name != OURS}


def step_us(args: Sequence[Tensor], device: torch.device, calls: int = 200) -> float:
    """Return the microseconds of one step at batch 1, with overhead; the device may run asynchronously."""
    x, r, b = args
    zeros = torch.zeros(1, *x.shape[3:], device=device)
    token = x[:1, 0].contiguous()
    state = slstm_step(token, r, b, zeros, zeros, zeros, zeros)

    def run() -> None:
        current = state
        for _ in range(calls):
            current = slstm_step(token, r, b, *current)

    with torch.inference_mode():
        run()
        return statistics.median(timed(run, device) for _ in range(7)) / calls * 1e3


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps; default auto")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default float32, on CUDA bfloat16")
    parser.add_argument("--shapes", nargs="+", metavar="B,NH,DH,S", help="default those of the device")
    parser.add_argument("--without", nargs="*", default=[], metavar="NAME", help="contenders to leave out")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each measurement, default 5")
    parser.add_argument("--json", type=Path, help="where to write the result")
    given = parser.parse_args(arguments)
    device = devices.resolve_device(given.device)
    dtype = getattr(torch, given.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    cases = []
    for text in given.shapes or SHAPES[device.type]:
        case = measure(Shape(*map(int, text.split(","))), dtype, device, given.seconds, given.without)
        print(json.dumps(case, indent=1), flush=True)
        cases.append(case)
    save({"machine": machine(device), "cases": cases}, given.json)


if __name__ == "__main__":
    main()
