"""Time the queued schedule against the inductor schedule on one mLSTM prefill, and print their plans.

    python -m benchmarks.schedules --json result.json                 # this machine's first device
    python -m benchmarks.schedules --schedules inductor queued ray --sweep    # at which lengths each is faster
    python -m benchmarks.schedules --cases 1,2,256,512,4096:segment=1024,heads_per_band=2   # B,NH,DHQK,DHHV,S:settings

Each schedule is compared with the other one, and on a short sequence with the recurrence, before it is timed; then they
take turns call by call, so that other load of the machine affects both.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.timing import machine, save, timed
from torch_xlstm_ops import config
from torch_xlstm_ops.api import mlstm_chunkwise
from torch_xlstm_ops.config import Schedule
from torch_xlstm_ops.maths.shapes import dtype_name
from torch_xlstm_ops.runtime import devices
from torch_xlstm_ops.schedules import plan
from torch_xlstm_ops.schedules.machine import machine as machine_of

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}  # relative, in the Euclidean norm
SCHEDULES = ("inductor", "queued")
# The shape of a 7B model; one band, whose summaries two workers compute; and two bands of one head.
CASES = ["1,8,256,512,8192", "1,2,256,512,4096:segment=1024,heads_per_band=2", "1,2,256,512,4096:segment=1024"]
SWEEP = [f"1,8,256,512,{S}" for S in (512, 2048, 8192, 32_768, 65_536)]
CHECKED_TOKENS = 96  # compared with the recurrence


class Case(NamedTuple):
    """The sizes of one call, and the settings of both schedules."""

    B: int
    NH: int
    DHQK: int
    DHHV: int
    S: int
    settings: dict[str, int]

    @classmethod
    def parse(cls, text: str) -> Case:
        """Parse ``B,NH,DHQK,DHHV,S`` with optional ``:field=value,...``."""
        sizes, _, settings = text.partition(":")
        pairs = (pair.split("=") for pair in settings.split(",") if pair)
        B, NH, DHQK, DHHV, S = map(int, sizes.split(","))
        return cls(B, NH, DHQK, DHHV, S, {field: int(value) for field, value in pairs})


def draw(case: Case, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Return q, k, v, igate, fgate; forget gates are mostly open, as in trained models."""
    g = torch.Generator().manual_seed(0)
    B, NH, DHQK, DHHV, S, _ = case
    streams = [torch.randn(B, NH, S, D, generator=g).to(device, dtype) for D in (DHQK, DHQK, DHHV)]
    igate, fgate = (torch.randn(B, NH, S, generator=g).to(device) for _ in range(2))
    return [*streams, igate, fgate + 3]


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def check(args: Sequence[Tensor], outputs: dict[str, Tensor]) -> dict[str, float]:
    """Return each schedule's distance from inductor's h, and from the recurrence's on the first tokens."""
    short = [t[:, :, :CHECKED_TOKENS] for t in args]
    wanted, _ = mlstm_chunkwise(*short, schedule="recurrent")
    errors = {f"{name} to inductor": distance(h, outputs["inductor"]) for name, h in outputs.items()}
    errors |= {f"{name} to recurrent": distance(h[:, :, :CHECKED_TOKENS], wanted) for name, h in outputs.items()}
    if max(errors.values()) > TOLERANCE[args[0].dtype]:
        raise SystemExit(f"wrong: {errors}")
    return errors


def measure(
    case: Case, dtype: torch.dtype, device: torch.device, rounds: int, learning: bool, names: Sequence[str] = SCHEDULES
) -> dict[str, Any]:
    """Return one case's medians, plans, and the ratio of each to inductor."""
    args = draw(case, dtype, device)
    if learning:
        args = [t.requires_grad_() for t in args]

    def call(schedule: str) -> Tensor:
        h, _ = mlstm_chunkwise(*args, schedule=schedule)
        if learning:
            torch.autograd.grad(h, args, h.detach())
        return h.detach()

    with config.use(**case.settings), nullcontext() if learning else torch.inference_mode():
        plans = {}
        for name in names:
            shape = plan.Shape(case.B * case.NH, case.S, case.DHQK, case.DHHV)
            plans[name] = plan.make(shape, device.type, config.for_call(schedule=name),
                                    machine_of(device, Schedule(name)))
        first = {name: timed(lambda name=name: call(name), device) / 1e3 for name in names}  # type: ignore[misc]
        errors = check([t.detach() for t in args], {name: call(name) for name in names})
        taken: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(rounds):
            for name in names:
                taken[name].append(timed(lambda name=name: call(name), device))  # type: ignore[misc]
    medians = {name: round(statistics.median(times), 2) for name, times in taken.items()}
    return {
        "case": case._asdict(), "dtype": dtype_name(dtype), "backward": learning, "median_ms": medians,
        "fastest_ms": {name: round(min(times), 2) for name, times in taken.items()},
        "ratio": {name: round(ms / medians["inductor"], 4) for name, ms in medians.items()},
        "first_call_s": {name: round(seconds, 1) for name, seconds in first.items()},
        "errors": errors, "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "plans": {name: str(p).splitlines() for name, p in plans.items()},
    }


def table(cases: Sequence[dict[str, Any]]) -> str:
    """Return a line for each case, and the cases in which each schedule was faster than each other."""
    names = list(cases[0]["median_ms"])
    lines = ["  ".join(["B,NH,DHQK,DHHV,S".ljust(40), *(f"{name + ' ms':>12}" for name in names)])]
    for case in cases:
        lines.append("  ".join([_size(case).ljust(40), *(f"{case['median_ms'][name]:>12.2f}" for name in names)]))
    for name, other in itertools.permutations(names, 2):
        faster = [_size(case) for case in cases if case["median_ms"][name] < case["median_ms"][other]]
        lines.append(f"{name} faster than {other}: {'; '.join(faster) or 'at none of these'}")
    return "\n".join(lines)


def _size(case: dict[str, Any]) -> str:
    *sizes, settings = case["case"].values()
    return ",".join(map(str, sizes)) + "".join(f" {field}={value}" for field, value in settings.items())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps; default auto")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--cases", nargs="+", metavar="B,NH,DHQK,DHHV,S[:FIELD=VALUE,...]", default=CASES)
    parser.add_argument("--sweep", action="store_const", const=SWEEP, dest="cases",
                        help="one shape over lengths, in the place of --cases")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each schedule, default 15")
    parser.add_argument("--schedules", nargs="+", choices=["inductor", "queued", "ray"], default=SCHEDULES)
    parser.add_argument("--backward", action="store_true", help="time the gradients too")
    parser.add_argument("--json", type=Path, help="where to write the result")
    given = parser.parse_args(arguments)
    device, dtype = devices.resolve_device(given.device), getattr(torch, given.dtype)
    cases = []
    for text in given.cases:
        case = measure(Case.parse(text), dtype, device, given.rounds, given.backward, given.schedules)
        print(json.dumps(case, indent=1), flush=True)
        cases.append(case)
    print(table(cases))
    save({"machine": machine(device), "cases": cases}, given.json)


if __name__ == "__main__":
    main()
