"""Laws of bad input: one line and exit status 2."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from expecttest import assert_expected_inline

from tests.cli_models import (
    clean_settings,
    error,
    loaded,
    model_directory,
    write,
)
from tests.conftest import Command
from torch_xlstm_ops import schedules
from torch_xlstm_ops.cli.generation import runner, stream
from torch_xlstm_ops.cli.shared import errors

__all__ = ["clean_settings", "loaded", "model_directory", "write"]  # fixtures
pytestmark = pytest.mark.usefixtures("one_thread")


def test_bad_flags_are_one_line(run: Command, write: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "load", lambda *a: pytest.fail("a model was loaded"))
    (tmp_path / "empty").write_text("")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    messages = [
        error(run()),
        error(run("generate", "--colour")),
        error(run("generate", "--prompt")),
        error(run("generate", "--prompt", "")),
        error(run("generate", "--prompt", "a", "--prompt-file", "b")),
        error(run("generate", "--prompt-file", tmp_path / "none")),
        error(run("generate", "--prompt-file", tmp_path / "empty")),
        error(run("generate", "--prompt-file", tmp_path / "latin")),
        error(run("generate", "--max-new-tokens", "0")),
        error(run("generate", "--temperature", "-1")),
        error(run("generate", "--temperature", "nan")),
        error(run("generate", "--top-k", "5")),
        error(run("generate", "--temperature", "1", "--top-p", "2")),
        error(run("generate", "--stop", "")),
        error(run("generate", "--device", "gpu")),
        error(run("generate", "--dtype", "int8")),
        error(run("generate", "--schedule", "fast")),
        error(run("generate", "--chunk-size", "0")),
        error(run("generate", "--trace", "trace.txt")),
        error(run("generate", "--trace", tmp_path / "no" / "t.csv")),
        error(run("generate", "--stats-log", tmp_path / "no" / "s.csv")),
        error(run("generate", "--stats-log", "s.txt")),
        error(run("generate", "--stats-every", "3")),
        error(run("generate", "--model", tmp_path / "none")),
        error(write("--workers", "2", "--segment", "64")),
        error(run("info", "--window", "none")),
    ]
    assert_expected_inline("\n".join(messages).replace(str(tmp_path), "DIR"), """\
the following arguments are required: COMMAND
unrecognized arguments: --colour
argument --prompt: expected one argument
--prompt must not be empty, got ''
--prompt must come without --prompt-file, got both
--prompt-file must be a file that can be read, got DIR/none: No such file or directory
--prompt-file must not be empty, got an empty file
--prompt-file must be UTF-8 text, got DIR/latin: unexpected end of data at byte 3
--max-new-tokens must be a whole number of at least 1, got '0'
--temperature must be a number of at least 0, got '-1'
--temperature must be a number of at least 0, got 'nan'
--temperature must be above 0 with --top-k, got 0
--top-p must be a number above 0 and at most 1, got '2'
--stop must not be empty, got ''
--device must be one of auto, cpu, cuda, mps, got 'gpu'
--dtype must be one of auto, float32, bfloat16, float16, got 'int8'
--schedule must be one of auto, inductor, queued, ray, recurrent, got 'fast'
--chunk-size must be a whole number of at least 1, got '0'
--trace must be a file name ending in .csv, .jsonl or .json, got 'trace.txt'
trace must be a file that can be written, got 'DIR/no/t.csv', whose directory is not there
--stats-log must be a file that can be written, got 'DIR/no/s.csv', whose directory is not there
--stats-log must be a file name ending in .csv or .json, got 's.txt'
--stats-every must come with --stats-log, got 3 without
--model must be a directory of a Hugging Face xLSTM, got DIR/none, which is not there
--no-patch must come without flags of our schedules, got --segment, --workers
--window must be a whole number of at least 1, got 'none'""")


def test_a_schedule_that_cannot_run_says_why(run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedules, "unavailable", lambda schedule, device: "it rains", raising=False)
    message = error(run("generate", "--schedule", "queued", "--device", "cpu"))
    assert_expected_inline(message, """schedule must be one that can run on cpu, got queued: it rains""")


def test_a_missing_extra_says_what_to_install(run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "find_spec", lambda name: None)
    assert_expected_inline(error(run("generate")), """\
generate needs transformers, safetensors, rich: run pip install -e ".[models]" in a checkout of torch_xlstm_ops""")


def test_directories_that_hold_no_usable_xlstm_are_one_line(
    run: Command, model_directory: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    directory = tmp_path / "broken"

    def broken(change: Callable[[], object]) -> str:
        shutil.copytree(model_directory, directory)
        change()
        message = error(run("generate", "--model", directory, "--no-patch"))
        shutil.rmtree(directory) if directory.is_dir() else directory.unlink()
        return message

    def edit(name: str, **changes: object) -> None:
        content = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps({**content, **changes}))

    def change_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        weights = load_file(directory / "model.safetensors")
        change(weights)
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})

    def without_tokenizer() -> None:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (directory / name).unlink()

    head = "lm_head.weight"
    messages = [
        error(run("generate", "--model", directory, "--no-patch")),
        broken(lambda: [shutil.rmtree(directory), directory.write_text("")]),
        broken(lambda: (directory / "config.json").unlink()),
        broken(lambda: (directory / "config.json").write_text("{")),
        broken(lambda: edit("config.json", model_type="llama")),
        broken(lambda: edit("config.json", hidden_size="wide")),
        broken(lambda: (directory / "model.safetensors").unlink()),
        broken(lambda: (directory / "model.safetensors").write_bytes(b"half")),
        broken(lambda: change_weights(lambda weights: weights.pop(head))),
        broken(lambda: change_weights(lambda weights: weights.update({head: weights[head][:10].contiguous()}))),
        broken(lambda: change_weights(lambda weights: weights.update({head: weights[head] * torch.nan}))),
        broken(without_tokenizer),
        broken(lambda: (directory / "tokenizer.json").write_text("{}")),
    ]
    assert_expected_inline("\n".join(messages).replace(str(tmp_path), "DIR"), """\
--model must be a directory of a Hugging Face xLSTM, got DIR/broken, which is not there
--model must be a directory of a Hugging Face xLSTM, got DIR/broken, which is a file
--model must be a directory of a Hugging Face xLSTM, got DIR/broken without config.json
--model must be a directory of a Hugging Face xLSTM, got DIR/broken with a config.json that cannot be read
--model must be a directory of a Hugging Face xLSTM, got DIR/broken of model_type 'llama'
--model must hold a config.json that transformers can read, got DIR/broken: StrictDataclassFieldValidationError: Validation error for field 'hidden_size': TypeError: Field 'hidden_size' expected int, got str (value: 'wide')
--model must be a directory of a Hugging Face xLSTM, got DIR/broken without weights (model.safetensors)
--model must hold weights that transformers can read, got DIR/broken: SafetensorError: Error while deserializing header: header too small
--model must hold every weight of its config.json, got DIR/broken without lm_head.weight
--model must hold lm_head.weight of shape (257, 64), got (10, 64) in DIR/broken
the model's logits after the prompt are NaN: try --dtype float32
--model must hold its tokenizer, got DIR/broken without tokenizer.json
--model must hold a tokenizer that transformers can read, got DIR/broken: KeyError: 'added_tokens'""")  # noqa: E501


def test_a_failed_run_leaves_no_log(write: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> Iterator[int]:
        yield 1
        raise errors.BadInput("the model must not be broken, got broken")

    monkeypatch.setattr(stream, "generate_tokens", fail)
    status, _, err = write("--stats-log", tmp_path / "s.csv")
    assert (status, err.splitlines()[-1]) == (2, "xlstm-ops: error: the model must not be broken, got broken")
    assert os.listdir(tmp_path) == []
