"""Which of its two branches transformers builds its xLSTM on: it looks for the package xlstm once in a process."""

from __future__ import annotations

import importlib.util
import os
import sys


def choose() -> None:
    """Have it build on its own classes, unless told to build on the package xlstm, in this process.

    `test_patch_branches` runs the other branch in a process of its own.
    """
    if os.environ.get("XLSTM_TEST_BRANCH") == "xlstm":
        return
    if importlib.util.find_spec("transformers") is None or importlib.util.find_spec("xlstm") is None:
        return
    from transformers.utils import import_utils

    sys.modules["xlstm"] = None  # type: ignore[assignment]  # which hides it
    assert not import_utils.is_xlstm_available()
    del sys.modules["xlstm"]
    assert not import_utils.is_xlstm_available(), "transformers no longer remembers what it found"
