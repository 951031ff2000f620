"""Sharded and nested tensors: what DTensor may shard, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import dtensor_laws
from tests.operator_cases import ops
from torch_xlstm_ops.ops.table import OPERATORS

ROOT = Path(__file__).parent.parent
needs_gloo = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="torch is without gloo"
)


def on_two_processes(law, tmp_path):
    """Run a law of `dtensor_laws` in two processes that find each other through a file."""
    command = [sys.executable, "-m", "tests.dtensor_laws", law.__name__]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], cwd=ROOT, env=environment,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(dtensor_laws.WORLD)
    ]
    try:
        said = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, text in zip(processes, said, strict=True):
        assert process.returncode == 0, text


@needs_gloo
@pytest.mark.parametrize("law", [
    pytest.param(dtensor_laws.operators, marks=pytest.mark.slow),
    pytest.param(dtensor_laws.options, marks=pytest.mark.soak),
    pytest.param(dtensor_laws.in_place, marks=pytest.mark.slow),
    pytest.param(dtensor_laws.heads_in_parallel, marks=pytest.mark.soak),
], ids=lambda law: law.__name__)
def test_sharded_calls_equal_whole_ones(law, tmp_path):
    on_two_processes(law, tmp_path)


@needs_gloo
@pytest.mark.slow
def test_a_fully_sharded_patched_model_learns_as_the_whole_one(tmp_path):
    pytest.importorskip("transformers")
    on_two_processes(dtensor_laws.fully_sharded, tmp_path)


def test_every_operator_has_a_rule():
    for operator in OPERATORS.values():
        schema = operator.overload._schema
        assert len(operator.arguments) == sum(not argument.kwarg_only for argument in schema.arguments)
        assert len(operator.results) == len(schema.returns)


def nested(layout, *sizes):
    return torch.nested.nested_tensor([torch.randn(S, *sizes) for S in (3, 5)], layout=layout)


@pytest.mark.parametrize("learning", [False, True])
@pytest.mark.parametrize(("layout", "kind"), [(torch.jagged, "jagged"), (torch.strided, "strided")])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_are_refused(layout, kind, learning):
    wanted = rf"must be a dense tensor, got a nested one \({kind}\): .* in reset"
    q = k = v = nested(layout, 2, 3).requires_grad_(learning).transpose(1, 2)
    igate = fgate = nested(layout, 2).transpose(1, 2)
    with pytest.raises(TypeError, match=f"q {wanted}"):
        ops.mlstm_chunkwise(q, k, v, igate, fgate)
    x = nested(layout, 4, 2, 3).requires_grad_(learning)
    with pytest.raises(TypeError, match=f"x {wanted}"):
        ops.slstm_sequence(x, torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3))
