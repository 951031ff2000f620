"""Count the work of the generated Metal and the ATen calls of a computation, and predict its time on an Apple GPU.

Launches are counted exactly, on the emulated device of tests/mps. A submission is charged its launch plus the longer of
its memory traffic and its arithmetic at the chip's published rates. Traffic is every buffer once, or the part that its
threads can access if that is less: caches are assumed perfect inside a launch and empty between launches. Arithmetic is
2 M N K for a product, and the operators in the source of a generated kernel, where a transcendental function counts
eight.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.mps import emulator
from tests.mps.emulator import AtenCall, Launch, Operand
from tests.mps.emulator.translate import KernelSource, kernels_of

PRODUCTS = {"bmm", "mm", "baddbmm", "baddbmm_", "addmm", "matmul"}
# Measured on an M1 Pro with one element, pytorch#148219: ops that are Metal kernels take 4.6 to 7.6 us, ops through
# MPSGraph 20 to 21.
METAL_LAUNCH, GRAPH_LAUNCH = 5e-6, 20e-6
THROUGH_GRAPH = PRODUCTS | {"cumsum", "cumprod", "logcumsumexp", "sort", "topk"}
TRANSCENDENTAL = 8


class Chip(NamedTuple):
    """Published rates: bytes and float32 operations a second."""

    bandwidth: float
    flops: float
    source: str


CHIPS = {
    "M1": Chip(68.25e9, 2.6e12, "Apple newsroom 2020-11-10 (2.6 teraflops); LPDDR4X-4266 on 128 bits"),
    "M2": Chip(100e9, 3.6e12, "Apple newsroom 2022-06-06 (100 GB/s); 10 cores x 128 lanes x 2 x 1.398 GHz"),
    "M2 Ultra": Chip(800e9, 27.2e12, "Apple newsroom 2023-06-05 (800 GB/s); 76 cores x 128 lanes x 2 x 1.398 GHz"),
}


class Submission(NamedTuple):
    """The cost of one launch or ATen call."""

    name: str
    is_product: bool
    launch_s: float
    nbytes: int
    flops: float


def count(run: Callable[[], object]) -> list[Submission]:
    """Return the submissions of one call, after one call that compiles; host traffic and views are free."""
    run()
    with emulator.recording() as log:
        run()
    return [_launch(entry) if isinstance(entry, Launch) else _aten(entry) for entry in log.submissions]


def _launch(launch: Launch) -> Submission:
    kernel, threads = _kernel(launch.source, launch.kernel), math.prod(launch.threads)
    nbytes = sum(min(operand.nbytes, threads * _accesses(kernel.body, operand)) for operand in launch.buffers)
    return Submission(launch.kernel, False, METAL_LAUNCH, int(nbytes), threads * _operations(kernel.body))


def _accesses(body: str, operand: Operand) -> float:
    """Return an upper bound of the bytes of a buffer that one thread accesses."""
    elements = max(1, math.prod(operand.sizes))
    width = max(1, operand.nbytes // elements)
    return width * sum(n * len(re.findall(rf"\b{operand.name}\b", line)) for n, line in _repeated(body))


@functools.cache
def _kernel(path: str, name: str) -> KernelSource:
    return next(kernel for kernel in kernels_of(Path(path).read_text()) if kernel.name == name)


def _aten(call: AtenCall) -> Submission:
    is_product = call.op in PRODUCTS
    elements = max((math.prod(t.sizes) for t in call.tensors if t.written), default=0)
    flops = float(elements)
    if is_product:
        left = [t for t in call.tensors if not t.written and len(t.sizes) > 1][-2]
        flops = 2.0 * elements * left.sizes[-1]
    launch_s = GRAPH_LAUNCH if call.op in THROUGH_GRAPH else METAL_LAUNCH
    return Submission(call.op, is_product, launch_s, sum(t.nbytes for t in call.tensors), flops)


def _operations(body: str) -> float:
    """Count the arithmetic of a kernel on its values; lines of index arithmetic declare an int and are free."""
    total = 0.0
    for times, line in _repeated(body):
        if re.match(r"\s*(?:int|uint|long|threadgroup)\b", line) or "=" not in line:
            continue
        value = re.sub(r"\[[^\]]*\]|static_cast<[^;]*?>|decltype\([^)]*\)", "", line.split("=", 1)[1])
        functions = len(re.findall(r"\b(?:exp|exp2|log|log2|tanh|sin|cos|sqrt|rsqrt|pow|log1p|expm1)\(", value))
        operators = len(re.findall(r"(?<=[\w)\] ])[-+*/](?=[ \w(])|<=|>=|==|\?|\b(?:max|min|abs)\(", value))
        sums = len(re.findall(r"\bthreadgroup_(?:sum|max|min|prod)\(", value))
        accumulates = 1 if re.search(r"[-+*/]=", line) else 0
        total += times * (operators + TRANSCENDENTAL * functions + accumulates + 2 * sums)
    return total


def _repeated(body: str) -> Iterator[tuple[float, str]]:
    """Yield each line of a kernel with the number of times that a thread runs it."""
    repeats = [1.0]
    for line in body.splitlines():
        if loop := re.search(r"\bfor\s*\(auto (\w+) = 0; \1 < (\d+)", line):
            repeats.append(repeats[-1] * int(loop[2]))
        elif line.strip() == "}" and len(repeats) > 1:
            repeats.pop()
        else:
            yield repeats[-1], line


def predicted(submissions: Sequence[Submission], chip: Chip) -> float:
    """Return the seconds that a list of submissions takes, one after another."""
    return sum(s.launch_s + max(s.nbytes / chip.bandwidth, s.flops / chip.flops) for s in submissions)
