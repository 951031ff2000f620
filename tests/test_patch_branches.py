"""transformers builds its xLSTM on its own classes or on the package xlstm: every law of the drop-in holds on both."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
def test_the_laws_hold_where_transformers_builds_on_xlstm() -> None:
    pytest.importorskip("transformers", reason="needs the package transformers")
    pytest.importorskip("xlstm", reason="needs the package xlstm")
    names = ("transformers", "decoding", "models", "caches", "packing")
    laws = [str(HERE / f"test_patch_{name}.py") for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *laws]
    done = subprocess.run(command, cwd=HERE.parent, env={**os.environ, "XLSTM_TEST_BRANCH": "xlstm"},
                          capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 30
    assert "skipped" not in done.stdout


def test_this_process_takes_the_selected_branch() -> None:
    pytest.importorskip("transformers", reason="needs the package transformers")
    from transformers.models.xlstm import modeling_xlstm

    assert modeling_xlstm.external_xlstm == (os.environ.get("XLSTM_TEST_BRANCH") == "xlstm")
