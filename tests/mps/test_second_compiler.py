"""Laws of the generated Metal under a compiler with real address spaces."""

from __future__ import annotations

from pathlib import Path

import pytest

from .emulator import second_compiler
from .jobs import Job, Reports, job

pytestmark = pytest.mark.skipif(second_compiler.compiler() is None,
                                reason=f"no clang {second_compiler.OLDEST} or newer")
SOURCES = [
    pytest.param(job("submissions", model="embedded", dtype=dtype, patched=True), id=dtype, marks=pytest.mark.slow)
    for dtype in ("float32", "bfloat16")
]
KERNEL = """
kernel void generated_kernel_0(device float* out, constant float* in, uint i [[thread_position_in_grid]]) {
    %s
}
"""
STATEMENTS = {
    "out[i] = in[i];": True,
    "threadgroup float shared[4]; shared[i] = in[i]; out[i] = shared[i];": True,
    "in[i] = out[i];": False,
    "device float* other = in; out[i] = other[i];": False,
    "out[i] = metal::no_such_function(in[i]);": False,
    "bfloat a = out[i]; out[i] = a;": False,
}


@pytest.mark.parametrize(("statement", "taken"), STATEMENTS.items())
def test_faults_are_refused(statement: str, taken: bool) -> None:
    assert (second_compiler.refusal(KERNEL % statement) == "") == taken


@pytest.mark.parametrize("wanted", SOURCES)
def test_every_kernel_of_a_model_is_taken(reports: Reports, wanted: Job) -> None:
    sources = reports(wanted)["sources"]
    assert len(sources) >= 8  # each of several kernels
    refused = {source: found for source in sources if (found := second_compiler.refusal(Path(source).read_text()))}
    assert not refused
