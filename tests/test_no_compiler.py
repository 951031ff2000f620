"""Laws of machines where Inductor cannot compile, or cannot keep what it compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RUN = """
import warnings
import torch
from tests import oracle
from torch_xlstm_ops import mlstm_chunkwise, mlstm_step, mlstm_step_, slstm_sequence

with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always", RuntimeWarning)
    args = [t.requires_grad_() for t in oracle.draw(oracle.Sizes(S=40), torch.float32)]
    h, state = mlstm_chunkwise(*args, chunk_size=16)
    wide = [t.detach().double().requires_grad_() for t in args]
    wanted = oracle.exact(wide)
    oracle.assert_close([h, *state], wanted, oracle.TOLERANCE[torch.float32])
    found = torch.autograd.grad(oracle.weigh([h, *state]), args)
    expected = torch.autograd.grad(oracle.weigh(wanted), wide)
    oracle.assert_close(found, expected, oracle.GRADIENT_TOLERANCE[torch.float32])
    q, k, v, igate, fgate, *states = [t.detach() for t in args]
    token = [q[:, :, 0], k[:, :, 0], v[:, :, 0], igate[:, :, :1], fgate[:, :, :1], *states]
    h, state = mlstm_step(*token)
    assert torch.equal(mlstm_step_(*token), h)
    assert torch.equal(token[5], state.c)
    x, r, b = torch.randn(2, 5, 4, 2, 4), torch.randn(4, 2, 4, 4), torch.randn(4, 2, 4)
    slstm_sequence(x.requires_grad_(), r, b)[0].sum().backward()
print("\\n".join(str(w.message) for w in told if issubclass(w.category, RuntimeWarning)))
"""
EXPLICIT = """
import torch
from tests import oracle
from torch_xlstm_ops import mlstm_chunkwise
try:
    mlstm_chunkwise(*oracle.draw(oracle.Sizes(S=40)), schedule="inductor")
except RuntimeError as error:
    print(error)
"""


def run(code: str, tmp_path: Path, **environment: str) -> list[str]:
    """Return the lines that a fresh Python with an empty cache prints."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
           "XLSTM_OPS_KERNELS": "off", **environment}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_without_a_compiler_operators_run_uncompiled_with_one_warning(tmp_path):
    lines = run(RUN, tmp_path, CXX="/nowhere/g++")
    assert len(lines) == 1
    assert lines[0].startswith("kernels cannot be compiled here (InvalidCxxCompiler")
    assert "install g++ or clang" in lines[0]


@pytest.mark.slow
def test_without_a_compiler_an_explicit_schedule_is_refused_in_one_line(tmp_path):
    (line,) = run(EXPLICIT, tmp_path, CXX="/nowhere/g++")
    assert "compiled kernels, which cannot be compiled here (InvalidCxxCompiler" in line


@pytest.mark.slow
def test_a_cache_that_is_a_file_warns_once_and_kernels_are_compiled_in_another_folder(tmp_path):
    (tmp_path / "file").write_text("no folder")
    lines = run(RUN, tmp_path, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "file"))
    assert len(lines) == 1
    assert lines[0].startswith("Inductor's cache cannot be written")
