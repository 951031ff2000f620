"""What the README says that code can check."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import torch_xlstm_ops
from torch_xlstm_ops import config

README = (Path(__file__).parent.parent / "csrc_free_README.md").read_text(encoding="utf-8")


def test_the_configuration_table_is_that_of_the_code():
    assert config.markdown().strip() in README


def test_every_operator_is_listed():
    """The library's own list of operators, as the dispatcher has it."""
    names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("xlstm::")}
    assert names
    assert all(f"`{name}`" in README for name in names)


@pytest.mark.slow
def test_the_example_for_own_blocks_runs():
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "mlstm_chunkwise(q" in block)
    scope: dict[str, object] = {}
    exec(code, scope)
    assert isinstance(scope["state"], torch_xlstm_ops.MLSTMState)
