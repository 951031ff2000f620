"""Time our mLSTM against the native code of mlstm_kernels and transformers: prefill, step, and what a compile costs.

    python -m benchmarks.mlstm --json result.json
    python -m benchmarks.mlstm prefill --shapes 1,8,256,512,2048      # B,NH,DHQK,DHHV,S

Every contender is held to the float64 recurrence before it is timed; one that is not there is named with the reason;
the others take turns call by call. The peers run at each of their chunk sizes, and the best one counts.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.timing import alternate, machine, save
from torch_xlstm_ops import devices, mlstm, mlstm_chunkwise, mlstm_step

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}  # relative, in the Euclidean norm
SHAPES = {
    "prefill": ["1,8,256,512,2048", "1,4,128,128,2048", "1,4,64,64,2048", "1,4,64,64,64"],
    "step": ["1,4,64,64,1", "1,8,256,512,1"],
    "compile": ["1,4,128,128,2048", "1,4,64,64,1000"],
}
CHUNK_SIZES = (32, 64, 128, 256)
OURS = "ours"

Run = Callable[..., Any]


class Shape(NamedTuple):
    """The sizes of one case."""

    B: int
    NH: int
    DHQK: int
    DHHV: int
    S: int


def draw(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Return q, k, v, igate, fgate as a trained model has them: most of the past is kept."""
    g = torch.Generator().manual_seed(0)
    B, NH, DHQK, DHHV, S = shape
    sizes = [(B, NH, S, DHQK), (B, NH, S, DHQK), (B, NH, S, DHHV), (B, NH, S), (B, NH, S)]
    drawn = [torch.randn(size, generator=g).to(device, dtype) for size in sizes]
    drawn[4] += 3.0
    return drawn


def prefill_peers() -> dict[str, Run | str]:
    """Return the peers' sequence functions, or the reason why one is not there."""
    peers: dict[str, Run | str] = {}
    for name, module, function in (
        ("transformers native", "transformers.models.xlstm.modeling_xlstm", "mlstm_chunkwise_native_autograd"),
        ("mlstm_kernels native", "mlstm_kernels.torch.chunkwise", "mlstm_chunkwise__native_autograd"),
    ):
        found = _find(module, function)
        for size in CHUNK_SIZES:
            peers[f"{name} {size}"] = found if isinstance(found, str) else _sized(found, size)
    return peers


def _sized(function: Run, size: int) -> Run:
    def run(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> Any:
        if q.shape[2] % size:
            raise ValueError(f"S must be a multiple of {size}")
        return function(q, k, v, i, f, return_last_states=True, chunk_size=size)

    return run


def step_peers() -> dict[str, Run | str]:
    """Return the peers' step functions, or the reason why one is not there."""
    return {
        "transformers native": _find("transformers.models.xlstm.modeling_xlstm", "mlstm_recurrent_step_native"),
        "mlstm_kernels native": _find("mlstm_kernels.torch.recurrent", "mlstm_recurrent_step__native"),
    }


def _find(module: str, function: str) -> Run | str:
    try:
        found: Run = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return found


def admitted(
    contenders: dict[str, Run | str], args: Sequence[Tensor], wanted: Tensor
) -> tuple[dict[str, Run], dict[str, str]]:
    """Return the contenders whose h is right, and why the others take no part."""
    usable, out = {}, {}
    for name, run in contenders.items():
        if isinstance(run, str):
            out[name] = run
            continue
        try:
            h = run(*args)[0]
        except (ValueError, RuntimeError, AssertionError) as error:
            out[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        distance = ((h.double().cpu() - wanted).norm() / wanted.norm()).item()
        if distance <= TOLERANCE[h.dtype]:
            usable[name] = run
        else:
            out[name] = f"its h is {distance:.1e} from the recurrence's"
    return usable, out


@torch.inference_mode()
def measure(kind: str, shape: Shape, dtype: torch.dtype, device: torch.device, seconds: float) -> dict[str, Any]:
    """Return the medians of one case, our ratio to the best peer, and who took no part."""
    args = draw(shape, dtype, device)
    zeros = [torch.zeros(size, device=device) for size in (
        (shape.B, shape.NH, shape.DHQK, shape.DHHV), (shape.B, shape.NH, shape.DHQK), (shape.B, shape.NH, 1))]
    wanted = mlstm.recurrent(*(t.double().cpu() for t in (*args, *zeros)), eps=1e-6)[0]
    contenders: dict[str, Run | str] = {OURS: mlstm_chunkwise, **prefill_peers()}
    if kind == "step":
        args = [*(t[:, :, 0] for t in args[:3]), *args[3:], *zeros]
        wanted = wanted[:, :, 0]
        contenders = {OURS: mlstm_step, **step_peers()}
    usable, out = admitted(contenders, args, wanted)
    if OURS not in usable:
        raise SystemExit(f"ours is wrong at {shape}: {out[OURS]}")
    medians = alternate({name: functools.partial(run, *args) for name, run in usable.items()}, device, seconds)
    peers_ms = {name: ms for name, ms in medians.items() if name != OURS}
    best = min(peers_ms, key=peers_ms.__getitem__, default=None)
    ratio = None if best is None else round(medians[OURS] / medians[best], 3)
    return {"kind": kind, "shape": shape._asdict(), "dtype": str(dtype).removeprefix("torch."), "ms": medians,
            "best_peer": best, "ratio": ratio, "no_part": out}


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
    """Return the seconds of a first call with an empty cache on disk, and in a second process that finds it filled."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        code = _COMPILE.format(shape=tuple(shape), device=device)

        def first_call() -> float:
            command = [sys.executable, "-c", code]
            done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            return round(float(done.stdout.split()[-1]), 1)

        return {"kind": "compile", "shape": shape._asdict(), "cold_s": first_call(), "second_process_s": first_call()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=list(SHAPES), help="prefill, step, compile; default all")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps; default auto")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the streams")
    parser.add_argument("--shapes", nargs="+", metavar="B,NH,DHQK,DHHV,S", help="default those of the kind")
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
                cases.append(measure(kind, shape, dtype, device, given.seconds))
            print(json.dumps(cases[-1], indent=1), flush=True)
    save({"machine": machine(device), "cases": cases}, given.json)


if __name__ == "__main__":
    main()
