"""Time our mLSTM against that of mlstm_kernels and transformers, native and Triton, and the lower bound of the machine.

    python -m benchmarks.mlstm --json result.json
    python -m benchmarks.mlstm prefill --shapes 1,8,256,512,2048      # B,NH,DHQK,DHHV,S

Kinds: prefill, train (forward and backward), step, called (a step in wall time, including submission), captured (a step
in a CUDA graph), scaling (a prompt at lengths up to 131,072; others on the CPU up to 8,192), and compile (seconds of a
first call). Every contender is compared with the float64 recurrence before it is timed (gradients with those of the
pure segments, which the tests compare with the recurrence's), in the first and last heads of the first and last batch
entries. One that is missing or wrong is reported with the reason; the others take turns call by call. Hand-written
backward kernels treat the normaliser as a constant: their gradients are compared with such ones, and the result names
them. The other packages run at each of their chunk sizes, and the best one counts. A reference computes less than an
mLSTM, and is not ranked.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import floors, peers
from benchmarks.peers import Contenders, Run
from benchmarks.timing import device_timed, joules, machine, peak_bytes, save, spread, timed, tried, turns, walled
from torch_xlstm_ops import config, mlstm_chunkwise, mlstm_step
from torch_xlstm_ops.maths import mlstm
from torch_xlstm_ops.maths.shapes import dtype_name
from torch_xlstm_ops.runtime import devices
from torch_xlstm_ops.schedules import plan

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}  # relative, in the Euclidean norm
GRADIENT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 6e-2, torch.float16: 2e-2}
SHAPES = {
    "prefill": ["1,8,256,512,2048", "1,4,128,128,2048", "1,4,64,64,2048", "1,4,64,64,64"],
    "train": ["1,8,256,512,2048", "1,4,64,64,2048"],
    "step": ["1,4,64,64,1", "1,8,256,512,1"],
    "called": ["1,8,256,512,1", "1,16,128,256,1"],
    "captured": ["1,8,256,512,1", "1,16,128,256,1"],
    "scaling": [f"1,4,128,128,{S}" for S in (512, 2048, 8192, 32768, 131072)],
    "compile": ["1,4,128,128,2048", "1,4,64,64,1000"],
}
_STEPS = ("step", "called", "captured")
_WALLED = ("prefill", "train")  # kinds timed on an idle device too, where submission counts
_CUDA_ONLY = ("called", "captured")  # elsewhere a step is timed in wall time
OURS = "ours"
LEFT_OUT = "left out"
MOST_TOKENS = {"cpu": 8192, "mps": 8192}  # of other packages in the kind scaling: their loops take seconds beyond
CHECKED_TOKENS = 2048  # of a longer sequence, compared with the recurrence


class Shape(NamedTuple):
    """The sizes of one case."""

    B: int
    NH: int
    DHQK: int
    DHHV: int
    S: int


def draw(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Draw q, k, v, igate, fgate as in a trained model, with mostly open forget gates.

    All are of `dtype`, but on CUDA the gates are what its peers want, float32.
    """
    g = torch.Generator(device).manual_seed(0)
    B, NH, DHQK, DHHV, S = shape
    q, k, v = (torch.randn((B, NH, S, D), generator=g, device=device).to(dtype) for D in (DHQK, DHQK, DHHV))
    of_gates = torch.float32 if device.type == "cuda" else dtype
    igate, fgate = (torch.randn((B, NH, S), generator=g, device=device).to(of_gates) for _ in range(2))
    return [q, k, v, igate, fgate + 3.0]


def admitted(
    contenders: Contenders, args: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float,
    without: Sequence[str] = (),
) -> tuple[dict[str, Run], dict[str, str]]:
    """Return the contenders with correct results, and the reasons against the others."""
    usable, out = {}, {}
    for name, run in contenders.items():
        if name.startswith(tuple(without)):
            out[name] = LEFT_OUT
        elif isinstance(run, str):
            out[name] = run
        elif reason := _rejected(run, args, wanted, tolerance):
            out[name] = reason
        else:
            usable[name] = run
    return usable, out


def _rejected(run: Run, args: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float) -> str | None:
    found, reason = tried(partial(run, *args))
    if reason is not None:
        return reason
    distance = max(_distance(a, b) for a, b in zip(found, wanted, strict=False))
    return None if distance <= tolerance else f"it is {distance:.1e} from the recurrence"


def checked(t: Tensor) -> Tensor:
    """Return the part of a tensor (B, NH, ...) to compare with the recurrence: its first and last rows, in float64."""
    B, NH = t.shape[:2]
    rows = t[::max(1, B - 1), ::max(1, NH - 1)]
    return (rows.cpu() if t.device.type == "mps" else rows).double()


def _distance(found: Tensor, wanted: Tensor) -> float:
    rows = checked(found)
    if rows.dim() > 2:
        rows = rows[:, :, :wanted.shape[2]]
    return float((rows - wanted).norm() / wanted.norm())


def measure(
    kind: str, shape: Shape, dtype: torch.dtype, device: torch.device, seconds: float,
    without: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the medians of one case, our ratios to the best package and to the floor, and who was excluded."""
    args = draw(shape, dtype, device)
    rows = [checked(t) for t in args]
    zeros = [torch.zeros(size, device=device) for size in (
        (shape.B, shape.NH, shape.DHQK, shape.DHHV), (shape.B, shape.NH, shape.DHQK), (shape.B, shape.NH, 1))]
    at, tolerance = floors.rates(device, dtype, torch.get_num_threads()), TOLERANCE[dtype]
    contenders: Contenders = {OURS: mlstm_chunkwise}
    most = MOST_TOKENS.get(device.type, shape.S)
    if kind in ("prefill", "train") or (kind == "scaling" and most >= shape.S):
        contenders |= peers.sequences(device, dtype)
    if kind == "train":
        contenders = {name: run if isinstance(run, str) else partial(_train, run) for name, run in contenders.items()}
        wanted = list(_train(_segments, *rows))
        tolerance = GRADIENT_TOLERANCE[dtype]
    else:
        empty = [torch.zeros_like(checked(t)) for t in zeros]
        with torch.inference_mode():
            wanted = [mlstm.recurrent(*(t[:, :, :CHECKED_TOKENS] for t in rows), *empty, eps=1e-6)[0]]
    if kind in _STEPS:
        args = [*(t[:, :, 0] for t in args[:3]), *args[3:], *zeros]
        wanted = [wanted[0][:, :, 0]]
        contenders = {OURS: mlstm_step, **peers.steps(device)}
        floor = floors.step_ms(shape, dtype, at)
    else:
        sizes = plan.Shape(shape.B * shape.NH, shape.S, shape.DHQK, shape.DHHV)
        L = plan.make(sizes, device.type, config.current()).chunk_size
        floor = floors.sequence_ms(shape, dtype, L, at, backward=kind == "train")
    with nullcontext() if kind == "train" else torch.inference_mode():
        usable, out = admitted(contenders, args, wanted, tolerance, without)
        if OURS not in usable:
            raise SystemExit(f"ours is wrong at {shape}: {out[OURS]}")
        simpler: dict[str, Run] = {}
        if kind == "train":
            others = {name: contenders[name] for name in out}
            simpler, out = admitted(others, args, _train(_constant_normaliser, *rows), tolerance, without)
            usable |= simpler
        calls = {name: _captured(run, args) if kind == "captured" else partial(run, *args)
                 for name, run in usable.items()}
        if kind in ("prefill", "train"):
            references, absent = _references(args, device, without, train=kind == "train")
            calls, out = calls | references, out | absent
        if kind == "scaling" and most < shape.S:
            out["other packages"] = f"not timed on this device beyond {most:,} tokens"
        memory = {name: peak_bytes(call, device) for name, call in calls.items()}
        taken = turns(calls, device, seconds, timed if kind == "called" else device_timed)
        ranked = {name: calls[name] for name in usable}
        walls = turns(ranked, device, seconds / 2, walled) if device.type == "cuda" and kind in _WALLED else {}
        medians = {name: _median(times) for name, times in taken.items()}
        best = min((name for name in usable if name != OURS), key=medians.__getitem__, default=None)
        energy, uncounted = joules({name: calls[name] for name in (OURS, best) if name}, device, seconds / 2)
    return {
        "kind": kind, "shape": shape._asdict(), "dtype": dtype_name(dtype), "ms": medians,
        "spread": {name: spread(times) for name, times in taken.items()}, "peak_bytes": memory,
        "ranked": [name for name in usable if name != OURS], "best_peer": best,
        "ratio": None if best is None else round(medians[OURS] / medians[best], 3),
        "wall_ms": {name: _median(wall for wall, _ in times) for name, times in walls.items()},
        "host_ms": {name: _median(host for _, host in times) for name, times in walls.items()},
        "floor_ms": round(floor, 4), "to_floor": round(medians[OURS] / floor, 2),
        "tokens_per_s": round(shape.B * shape.S / medians[OURS] * 1e3), "no_part": out,
        "joules": energy, "no_joules": uncounted,
        "constant_normaliser": list(simpler),
    }


def _median(times: Iterable[float]) -> float:
    return round(statistics.median(times), 4)


def _references(
    args: Sequence[Tensor], device: torch.device, without: Sequence[str], *, train: bool
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """Return the references, called once, and the reasons against the others."""
    calls, out = {}, {}
    for name, reference in peers.references(device, args, train=train).items():
        if isinstance(reference, str) or name.startswith(tuple(without)):
            out[name] = reference if isinstance(reference, str) else LEFT_OUT
            continue
        _, reason = tried(reference)
        if reason is None:
            calls[name] = reference
        else:
            out[name] = reason
    return calls, out


def _segments(*streams: Tensor) -> tuple[Tensor]:
    """Return h (B, NH, S, DHHV) by pure segments of 16 chunks, to be differentiated by autograd."""
    B, NH, S, DHQK = streams[0].shape
    state = [streams[0].new_zeros(B * NH, *sizes) for sizes in ((DHQK, streams[2].shape[-1]), (DHQK,), (1,))]
    h = []
    for part in zip(*(torch.split(t.flatten(0, 1), 1024, 1) for t in streams), strict=True):
        L = math.gcd(part[0].shape[1], 64)
        out, *state = mlstm.segment(*(t.unflatten(1, (-1, L)) for t in part), *state, eps=1e-6)
        h.append(out.flatten(1, 2))
    return (torch.cat(h, 1).view(B, NH, S, -1),)


def _constant_normaliser(q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor) -> tuple[Tensor]:
    """Return h by the parallel form; its gradient omits the denominator and the maximum in it."""
    decay = torch.nn.functional.logsigmoid(fgate).cumsum(-1)
    weights = decay[..., :, None] - decay[..., None, :] + igate[..., None, :]
    seen = torch.ones(weights.shape[-2:], dtype=torch.bool, device=q.device).tril()
    weights = torch.where(seen, weights, -math.inf)
    m = torch.maximum(weights.amax(-1), decay).detach()[..., None]
    A = q @ k.mT * q.shape[-1] ** -0.5 * torch.exp(weights - m)
    return (A @ v / (torch.maximum(A.sum(-1, keepdim=True).abs(), torch.exp(-m)) + 1e-6).detach(),)


def _captured(run: Run, args: Sequence[Tensor]) -> Callable[[], None]:
    """Return the replay of a CUDA graph of one call."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(*args)
    return graph.replay


def _train(run: Run, *args: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of all arguments for a gradient of ones."""
    leaves = [t.detach().requires_grad_() for t in args]
    h = run(*leaves)[0]
    return torch.autograd.grad(h, leaves, torch.ones_like(h))


_COMPILE = """
import time, torch, torch_xlstm_ops
B, NH, DHQK, DHHV, S = {shape}
args = [torch.randn(B, NH, S, d, device="{device}") for d in (DHQK, DHQK, DHHV)]
args += [torch.randn(B, NH, S, device="{device}")] * 2
start = time.perf_counter()
with torch.inference_mode():
    h, _ = torch_xlstm_ops.mlstm_chunkwise(*args)
    h.sum().item()
print(time.perf_counter() - start)
"""


def compile_seconds(shape: Shape, device: torch.device) -> dict[str, Any]:
    """Return the seconds of a first call with an empty disk cache, and in a second process with a filled one."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "XLSTM_OPS_KERNELS": f"{cache}/kernels"}
        code = _COMPILE.format(shape=tuple(shape), device=device)

        def first_call() -> float:
            command = [sys.executable, "-c", code]
            done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            return round(float(done.stdout.split()[-1]), 1)

        return {"kind": "compile", "shape": shape._asdict(), "cold_s": first_call(), "second_process_s": first_call()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=[kind for kind in SHAPES if kind not in _CUDA_ONLY],
                        help=f"{', '.join(SHAPES)}; default all but {' and '.join(_CUDA_ONLY)}, which are for CUDA")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps; default auto")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the streams")
    parser.add_argument("--shapes", nargs="+", metavar="B,NH,DHQK,DHHV,S", help="default those of the kind")
    parser.add_argument("--without", nargs="*", default=[], metavar="NAME",
                        help="peers and references to leave out, by the beginnings of their names: one that breaks a "
                             "GPU breaks all")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each case, default 10")
    parser.add_argument("--json", type=Path, help="where to write the result")
    given = parser.parse_args(arguments)
    device, dtype = devices.resolve_device(given.device), getattr(torch, given.dtype)
    cases = []
    for kind in given.kinds:
        for text in given.shapes or SHAPES[kind]:
            shape = Shape(*map(int, text.split(",")))
            if kind == "compile":
                cases.append(compile_seconds(shape, device))
            else:
                cases.append(measure(kind, shape, dtype, device, given.seconds, given.without))
            print(json.dumps(cases[-1], indent=1), flush=True)
            save({"machine": machine(device), "cases": cases}, given.json)  # a later case may crash


if __name__ == "__main__":
    main()
