"""Profiles of the drawn tests, and the seeds of the others."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("dev", max_examples=20, deadline=None)
hypothesis.settings.register_profile("ci", max_examples=100, deadline=None, derandomize=True)
hypothesis.settings.register_profile("fuzz", max_examples=2000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("XLSTM_TEST_PROFILE", "ci" if os.environ.get("CI") else "dev"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Start and end without compiled frames, and count from zero."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def _choose_branch() -> None:
    """Have transformers build its xLSTM on its own classes, unless told to build it on the package xlstm.

    It looks for that package once in a process; `test_patch_branches` runs the other branch in a process of its own.
    """
    if os.environ.get("XLSTM_TEST_BRANCH") == "xlstm" or importlib.util.find_spec("xlstm") is None:
        return
    from transformers.utils import import_utils

    sys.modules["xlstm"] = None  # type: ignore[assignment]  # which hides it
    assert not import_utils.is_xlstm_available()
    del sys.modules["xlstm"]
    assert not import_utils.is_xlstm_available(), "transformers no longer remembers what it found"


if importlib.util.find_spec("transformers") is not None:
    _choose_branch()
