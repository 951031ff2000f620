"""Laws of import callbacks: called once, after the module was executed, however often it was looked for before."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from torch_xlstm_ops.runtime import import_hook
from torch_xlstm_ops.runtime.import_hook import when_imported

NAME = "made_up_arrival"


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Put a module on the path, and check that every test leaves the finder unchanged."""
    path = tmp_path / f"{NAME}.py"
    path.write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    waiting, there = dict(import_hook._awaited), import_hook._finder in sys.meta_path
    yield path
    sys.modules.pop(NAME, None)
    assert (import_hook._awaited, import_hook._finder in sys.meta_path) == (waiting, there)


def test_every_callback_runs_once_after_the_module_was_executed() -> None:
    told: list[int] = []
    for _ in range(2):
        when_imported(NAME, lambda: told.append(sys.modules[NAME].value))
    module = importlib.import_module(NAME)
    assert told == [1, 1]
    importlib.reload(module)
    assert told == [1, 1]


def test_the_callback_for_an_imported_module_runs_at_once() -> None:
    importlib.import_module(NAME)
    told: list[str] = []
    when_imported(NAME, lambda: told.append(NAME))
    assert told == [NAME]


def test_looking_for_a_module_neither_imports_it_nor_uses_up_the_callback() -> None:
    told: list[str] = []
    when_imported(NAME, lambda: told.append(NAME))
    for _ in range(2):
        spec = importlib.util.find_spec(NAME)
        assert spec is not None
        assert spec.origin is not None
    assert told == []
    beside = importlib.util.module_from_spec(spec)
    assert spec.loader is not None
    spec.loader.exec_module(beside)  # which programs do not import
    assert told == []
    importlib.import_module(NAME)
    assert told == [NAME]


def test_an_import_that_fails_may_be_tried_again(module: Path) -> None:
    told: list[str] = []
    when_imported(NAME, lambda: told.append(NAME))
    module.write_text("raise KeyError('not yet')\n")
    with pytest.raises(KeyError):
        importlib.import_module(NAME)
    assert told == []
    module.write_text("value = 22222\n")
    importlib.invalidate_caches()
    importlib.import_module(NAME)
    assert told == [NAME]


def test_a_cancelled_callback_does_not_run() -> None:
    told: list[str] = []
    call_off = when_imported(NAME, lambda: told.append("off"))
    when_imported(NAME, lambda: told.append("on"))
    call_off()
    call_off()
    importlib.import_module(NAME)
    assert told == ["on"]


def test_the_module_keeps_its_own_loader() -> None:
    when_imported(NAME, lambda: None)
    module = importlib.import_module(NAME)
    assert type(module.__loader__).__name__ == "SourceFileLoader"
    assert module.__spec__ is not None
    assert module.__spec__.loader is module.__loader__


def test_a_module_that_is_not_there_is_not_found() -> None:
    call_off = when_imported("no_such_module_at_all", lambda: None)
    assert importlib.util.find_spec("no_such_module_at_all") is None
    call_off()
