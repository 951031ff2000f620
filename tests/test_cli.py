"""The laws of `xlstm-ops`: the text is the model's, the clock is honest, and bad input is one line and status 2."""

from __future__ import annotations

import csv
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given, settings
from hypothesis import strategies as st

import torch_xlstm_ops
from tests.conftest import Command
from torch_xlstm_ops import config, schedules, trace
from torch_xlstm_ops.cli.commands import info
from torch_xlstm_ops.cli.generation import meter, sampling, stream
from torch_xlstm_ops.cli.shared import loading, third_party
from torch_xlstm_ops.context import piece_size
from torch_xlstm_ops.patch import upstream
from torch_xlstm_ops.runtime import devices, torch_internals
from torch_xlstm_ops.runtime.extras import how_to_install
from torch_xlstm_ops.runtime.torch_internals.need import Status

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT = "def main(argv):\n"
CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a Hugging Face directory of a random xLSTM with a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, xLSTMConfig, xLSTMForCausalLM

    directory = tmp_path_factory.mktemp("xlstm") / "tiny"
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab={**vocabulary, "<end>": 256}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(directory)
    torch.manual_seed(0)
    settings = xLSTMConfig(vocab_size=257, hidden_size=64, num_hidden_layers=2, num_heads=2, qk_dim_factor=1.0,
                           chunk_size=16, pad_token_id=256, bos_token_id=256, eos_token_id=256)
    xLSTMForCausalLM(settings).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def loaded(model_directory: Path) -> loading.Loaded:
    return loading.load(model_directory, CPU)


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in list(os.environ):
        if name.startswith(config.PREFIX):
            monkeypatch.delenv(name)
    config.reload(flags={})
    yield
    monkeypatch.undo()
    config.reload(flags={})


@pytest.fixture
def write(run: Command, model_directory: Path) -> Command:
    """Run `generate` on the tiny model with transformers' own code, which needs no compiler."""

    def write(*arguments: object) -> tuple[int, str, str]:
        return run("generate", "--model", model_directory, "--prompt", PROMPT, "--no-patch", *arguments)

    return write


def text_and_table(out: str, err: str) -> tuple[str, dict[str, str]]:
    """Return the text on stdout, which holds nothing else, and the table on stderr."""
    return out.removesuffix("\n"), dict(re.findall(r"│ (.+?) +│ (.+?) +│", err))


def reference(loaded: loading.Loaded, count: int) -> str:
    """Return transformers' own greedy text."""
    ids = torch.tensor([loading.encode(loaded, PROMPT)])
    with torch.inference_mode():
        out = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    return str(loaded.tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True))


# Generation


@pytest.mark.smoke
def test_the_text_is_transformers_own_greedy_text(write: Command, loaded: loading.Loaded) -> None:
    status, *written = write("--max-new-tokens", 30)
    text, table = text_and_table(*written)
    assert status == 0
    assert text == reference(loaded, 30)
    assert (table["new tokens"], table["prompt tokens"], table["ended by"]) == ("30", str(len(PROMPT)), "length")


def test_the_table_tells_what_ran_and_how_fast(write: Command) -> None:
    table = text_and_table(*write("--max-new-tokens", 3)[1:])[1]
    for name in ("prefill tok/s", "decode tok/s", "time to first token s", "peak memory GiB"):
        assert float(table[name]) > 0
    assert table["schedule"] == "none, as not patched"
    assert table["prefill kernel"] == table["decode kernel"] == "transformers native"


def test_one_token_has_no_decode_speed(write: Command) -> None:
    table = text_and_table(*write("--max-new-tokens", 1)[1:])[1]
    assert (table["new tokens"], table["decode tok/s"]) == ("1", "-")


def test_text_ends_before_the_stop(write: Command, loaded: loading.Loaded) -> None:
    text = reference(loaded, 30)
    stop = text[10:12]
    shown, table = text_and_table(*write("--max-new-tokens", 30, "--stop", stop, "--stop", "never written")[1:])
    assert shown == text[: text.index(stop)]
    assert table["ended by"] == "stop text"


def test_text_ends_at_the_models_end_token(
    write: Command, loaded: loading.Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    third = loading.encode(loaded, PROMPT)[2]
    monkeypatch.setattr(stream, "stream", lambda *a: (t for t in (third, third, 256, third)))
    shown, table = text_and_table(*write()[1:])
    assert (shown, table["ended by"]) == (PROMPT[2] * 2, "end of text")


def test_sampling_repeats_with_its_seed_and_changes_with_another(write: Command) -> None:
    def text(seed: int) -> str:
        return write("--temperature", 5, "--top-k", 50, "--top-p", 0.9, "--seed", seed)[1]

    assert text(1) == text(1) != text(2)


def test_an_interrupt_shows_what_there_is_and_exits_130(write: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    push = sampling.TextStream.push

    def interrupted(self: sampling.TextStream, token: int) -> str:
        if len(self._tokens) > 12:
            raise KeyboardInterrupt
        return push(self, token)

    monkeypatch.setattr(sampling.TextStream, "push", interrupted)
    status, *written = write("--max-new-tokens", 30)
    assert status == 130
    assert text_and_table(*written)[1]["ended by"] == "interrupt"


@pytest.mark.parametrize(("segment", "length", "sizes"), [
    (None, 2048, [2048]), (None, 2049, [2048, 1]), (None, 5, [5]), (1000, 4001, [2000, 2000, 1]),
    (6000, 13000, [6000, 6000, 1000]),
])
def test_pieces_are_whole_segments_and_a_tail(segment: int | None, length: int, sizes: list[int]) -> None:
    with config.use(segment=segment):
        assert stream.pieces(length, CPU) == sizes


def test_a_prompt_read_in_pieces_gives_the_whole_prompts_logits(
    loaded: loading.Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = loading.encode(loaded, PROMPT * 5)
    seen: list[torch.Tensor] = []

    def logits() -> torch.Tensor:
        done: list[int] = []
        with stream.prepared(loaded):
            tokens = stream.stream(loaded, prompt, lambda x: seen.append(x) or 0, 1, meter.Meter(CPU),
                                     lambda step: done.append(step.position))
            assert list(tokens) == [0]
        progress.append(done)
        return seen[-1]

    progress: list[list[int]] = []
    whole = logits()
    monkeypatch.setitem(piece_size.PIECES, "cpu", 30)
    torch.testing.assert_close(logits(), whole, rtol=1e-4, atol=1e-5)
    assert (len(prompt), progress) == (80, [[], [30, 60, 80]])


def test_warm_up_and_preparation_leave_the_model_as_it_was(loaded: loading.Loaded) -> None:
    blocks, head = loaded.model.backbone.blocks, loaded.model.get_output_embeddings()
    prompt = loading.encode(loaded, PROMPT)
    with trace.record() as recording, stream.prepared(loaded):
        assert stream.warm_up(loaded, prompt) == ((), (), ())
    assert recording.entries() == []
    assert loaded.model.backbone.blocks is blocks
    assert not head._forward_pre_hooks
    assert not any(block._forward_pre_hooks for block in blocks)
    assert trace.current_layer() is None


# Statistics and traces


def test_the_log_has_both_phases_and_its_tokens_add_up(write: Command, tmp_path: Path) -> None:
    write("--max-new-tokens", 10, "--stats-log", tmp_path / "s.csv", "--stats-every", 4)
    with open(tmp_path / "s.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["phase"], int(row["tokens"])) for row in rows] == [
        ("prefill", len(PROMPT)), ("decode", 4), ("decode", 8), ("decode", 9)
    ]
    assert all(float(row["seconds"]) > 0 and float(row["interval_tok_s"]) > 0 for row in rows)


def test_a_json_log_tells_about_the_run_too(write: Command, tmp_path: Path) -> None:
    write("--max-new-tokens", 2, "--stats-log", tmp_path / "s.json")
    content = json.loads((tmp_path / "s.json").read_text())
    assert content["run"]["prompt tokens"] == len(PROMPT)
    assert [row["phase"] for row in content["rows"]] == ["prefill", "decode"]


def test_the_clock_is_read_only_after_a_synchronise(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(devices, "synchronize", lambda device: order.append("synchronize"))
    monkeypatch.setattr(meter.time, "perf_counter", lambda: order.append("clock") or float(len(order)))
    watched = meter.Meter(CPU, every=2)
    watched.start("decode")
    for _ in range(5):
        watched.add(1)
    watched.add(0, last=True)
    assert order == ["synchronize", "clock"] * 4
    assert [row.tokens for row in watched.rows] == [2, 4, 5]
    assert watched.final("decode") == watched.rows[-1]
    assert watched.final("prefill") is None


def test_a_trace_has_both_phases_and_a_summary_ends_the_run(write: Command, tmp_path: Path) -> None:
    _, out, err = write("--max-new-tokens", 4, "--trace", tmp_path / "t.json")
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert [e["cat"] for e in events if e["ph"] == "X" and e["name"] == "model"] == ["prefill", *["decode"] * 3]
    assert re.search(r"^model  prefill  cpu +1 ", err, re.MULTILINE)
    assert "prefill" not in out
    assert not trace.active()


@pytest.mark.smoke
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is:DeprecationWarning")  # of Inductor's own import
def test_our_operators_write_the_same_text_and_say_so(
    run: Command, model_directory: Path, loaded: loading.Loaded, tmp_path: Path
) -> None:
    status, *written = run("generate", "--model", model_directory, "--prompt", PROMPT, "--max-new-tokens", 30,
                           "--schedule", "inductor", "--trace", tmp_path / "t.jsonl")
    text, table = text_and_table(*written)
    assert status == 0
    assert text == reference(loaded, 30)
    ran = ("inductor", "xlstm::mlstm_chunkwise", "xlstm::mlstm_step")
    assert (table["schedule"], table["prefill kernel"], table["decode kernel"]) == ran
    entries = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    prefill = [entry for entry in entries if entry["op"] == "mlstm_chunkwise"]
    assert [entry["layer"] for entry in prefill] == [0, 1]
    assert {entry["schedule"] for entry in prefill} == {"inductor"}
    assert {entry["layer"] for entry in entries if entry["op"] == "model"} == {None}


# Text and sampling


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, token_ids: Any, *, skip_special_tokens: bool) -> str:
        return bytes(token_ids).decode("utf-8", errors="replace")


@settings(deadline=None)
@given(st.text(max_size=30), st.text(max_size=30))
def test_streamed_text_is_the_whole_text(prompt: str, text: str) -> None:
    stream = sampling.TextStream(Bytes(), list(prompt.encode()))
    parts = [stream.push(token) for token in text.encode()]
    assert "".join(parts) + stream.flush() == text
    assert all("\ufffd" not in part for part in parts) or "\ufffd" in text


@settings(deadline=None)
@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_streamed_text_ends_before_the_first_stop(text: str, stops: list[str]) -> None:
    stream = sampling.TextStream(Bytes(), [], stops)
    shown = ""
    for token in text.encode():
        shown += stream.push(token)
        if stream.stopped:
            break
    shown += stream.flush()
    ends = [at for at in map(text.find, stops) if at >= 0]
    assert stream.stopped == bool(ends)
    if ends:
        assert not any(stop in shown for stop in stops)
        assert text.startswith(shown)
        assert any(text.startswith(stop, len(shown)) for stop in stops)
    else:
        assert shown == text


def test_broken_characters_are_shown_sooner_or_later() -> None:
    stream = sampling.TextStream(Bytes(), [])
    assert "".join(stream.push(0xFF) for _ in range(20)) + stream.flush() == "\ufffd" * 20


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.floats(0.01, 1.0))
def test_candidates_are_the_likeliest_and_no_more_than_needed(seed: int, top_k: int, top_p: float) -> None:
    logits = torch.randn(30, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weights = sampling.candidates(logits, top_k, top_p)
    assert weights.sum().item() == pytest.approx(1.0)
    kept = int((weights > 0).sum())
    assert 1 <= kept <= min(top_k, 30)
    ordered = logits.sort(descending=True)
    assert set(ordered.indices[:kept].tolist()) == set(weights.nonzero().flatten().tolist())
    of_top_k = ordered.values[:top_k].softmax(-1)
    assert of_top_k[: kept - 1].sum() < top_p + 1e-9


def test_temperature_zero_takes_the_likeliest() -> None:
    assert sampling.chooser(temperature=0.0)(torch.tensor([0.0, 3.0, 2.0])) == 1


# Bad input


def error(result: tuple[int, str, str]) -> str:
    """Return the one line of an error."""
    status, out, err = result
    assert (status, out) == (2, "")
    assert err.endswith("\n")
    (line,) = [line for line in err.splitlines() if line not in ("loading broken", "warming up")]
    assert line.startswith("xlstm-ops: error: ")
    return line.removeprefix("xlstm-ops: error: ")


def test_bad_flags_are_one_line(run: Command, write: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "load", lambda *a: pytest.fail("a model was loaded"))
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
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
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
the model must give numbers after the prompt, got NaN: try --dtype float32
--model must hold its tokenizer, got DIR/broken without tokenizer.json
--model must hold a tokenizer that transformers can read, got DIR/broken: KeyError: 'added_tokens'""")  # noqa: E501


def test_a_failed_run_leaves_no_log(write: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> Iterator[int]:
        yield 1
        raise loading.BadInput("the model must not be broken, got broken")

    monkeypatch.setattr(stream, "stream", fail)
    status, _, err = write("--stats-log", tmp_path / "s.csv")
    assert (status, err.splitlines()[-1]) == (2, "xlstm-ops: error: the model must not be broken, got broken")
    assert os.listdir(tmp_path) == []


# Information and processes


def test_info_tells_devices_versions_schedules_and_sources(
    run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons = {config.Schedule.RAY: f"ray is not installed: {how_to_install('ray')}"}
    monkeypatch.setattr(schedules, "unavailable", lambda schedule, device: reasons.get(schedule), raising=False)
    monkeypatch.setattr(info, "PACKAGES", ("no_such_package",))
    table = {name: upstream.Peer("", f"{name}-ts", (1, 4), newest, name) for name, newest in
             (("no_such_peer", (1, 4)), ("there", (1, 6)), ("fork", (1, 4)), ("copied", (1, 4)))}
    monkeypatch.setattr(upstream, "PEERS", table)
    monkeypatch.setattr(upstream, "installed", lambda name: name != "no_such_peer")
    versions = {"there": upstream.Found("1.5.2", "there-ts"), "fork": upstream.Found("0.3", "my-fork"),
                "copied": upstream.Found(None, None)}
    monkeypatch.setattr(upstream, "found", versions.get)
    monkeypatch.setattr(info.platform, "python_version", lambda: "3.11.0")
    there = devices.Capabilities("cpu", None, ("8 threads",), False, False, devices.Memory(2**29, 2**30, None))
    gone = devices.Capabilities("mps", "MPS needs macOS, and this is linux", (), False, False, None)
    monkeypatch.setattr(devices, "report", lambda: (there, gone))
    needs = (Status("hooks", "", None, "speed"),
             Status("traced", "", "torch.moved is not there", "one graph a call"))
    monkeypatch.setattr(torch_internals, "status", lambda: needs)
    monkeypatch.setenv("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    monkeypatch.setattr(info.torch_internals, "compiler_missing", lambda: None)
    monkeypatch.setenv("XLSTM_MPS_WORKERS", "6")
    status, out, err = run("info", "--device", "cpu", "--chunk-size", "64")
    assert (status, err) == (0, "")
    assert_expected_inline(out.replace(torch_xlstm_ops.__version__, "VERSION"), """\
versions
  python           3.11.0
  torch_xlstm_ops  VERSION
  no_such_package  not installed

supported packages
  no_such_peer-ts  not installed   tested with 1.4
  there-ts         1.5.2           tested with 1.4 to 1.6
  fork-ts          0.3 of my-fork  tested with 1.4
  copied-ts        unknown         tested with 1.4

devices
  cpu                          8 threads, no streams, no events, memory 0.50 GiB of unknown
  mps                          MPS needs macOS, and this is linux
  C++ compiler                 found
  PYTORCH_ENABLE_MPS_FALLBACK  on: MPS operations may run on the CPU unseen

schedules on cpu
  auto       can run
  inductor   can run
  queued     can run
  ray        cannot run: ray is not installed: run pip install -e ".[ray]" in a checkout of torch_xlstm_ops
  recurrent  can run

configuration
  schedule        auto              default
  chunk_size      64                flag --chunk-size
  segment         the plan chooses  default
  heads_per_band  the plan chooses  default
  workers         6                 environment variable XLSTM_MPS_WORKERS
  streams         the plan chooses  default
  window          the plan chooses  default
  trace           off               default
  mem_fraction    the plan chooses  default
  ray_address     none              default
  tuned           on                default

tuned plans
  none: xlstm-ops tune finds them

private APIs of torch
  hooks   native
  traced  fallback: torch.moved is not there; one graph a call
""")


def _process(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "torch_xlstm_ops", *arguments], cwd=folder, capture_output=True,
                          text=True, env={**os.environ, **environment}, timeout=300)


def test_a_process_ends_with_one_line_and_status_2(tmp_path: Path) -> None:
    done = _process("generate", folder=tmp_path, XLSTM_OPS_WORKER="2")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert done.stderr.endswith("got XLSTM_OPS_WORKER\n")


@pytest.mark.smoke
def test_a_process_writes_text_to_a_pipe(model_directory: Path, loaded: loading.Loaded, tmp_path: Path) -> None:
    done = _process("generate", "--model", str(model_directory), "--prompt", PROMPT, "--no-patch",
                    "--max-new-tokens", "8", folder=tmp_path, PYTHONIOENCODING="ascii", OMP_NUM_THREADS="1")
    assert done.returncode == 0
    assert done.stdout == reference(loaded, 8).encode("ascii", "replace").decode() + "\n"
    assert done.stderr.splitlines()[:2] == ["loading tiny", "warming up"]
    assert {line[:1] for line in done.stderr.splitlines()[2:]} <= set("+|")
    assert os.listdir(tmp_path) == []


def test_a_quiet_process_writes_the_text_alone(
    model_directory: Path, loaded: loading.Loaded, tmp_path: Path
) -> None:
    done = _process("generate", "--quiet", "--model", str(model_directory), "--prompt", PROMPT, "--no-patch",
                    "--max-new-tokens", "8", "--trace", "t.csv", "--stats-log", "s.csv", folder=tmp_path,
                    OMP_NUM_THREADS="1", PYTHONIOENCODING="utf-8")
    assert (done.returncode, done.stdout, done.stderr) == (0, reference(loaded, 8) + "\n", "")
    assert sorted(os.listdir(tmp_path)) == ["s.csv", "t.csv"]


@pytest.mark.parametrize("quiet", [False, True])
def test_a_terminal_shows_the_text_and_unless_quiet_the_table(
    write: Command, loaded: loading.Loaded, monkeypatch: pytest.MonkeyPatch, quiet: bool
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    _, out, err = write("--max-new-tokens", 8, *(["--quiet"] if quiet else []))
    text, _, table = out.partition("\n┌")
    assert text.removesuffix("\n") == reference(loaded, 8)
    assert ("ended by" in table, err) == ((False, "") if quiet else (True, "loading tiny\nwarming up\n"))


@pytest.mark.slow  # it compiles everything anew
@pytest.mark.parametrize("flags", [(), ("--quiet",)], ids=["talking", "quiet"])
def test_a_first_run_on_a_machine_shows_no_warning(tmp_path: Path, flags: tuple[str, ...]) -> None:
    home = {name: str(tmp_path / name) for name in ("HOME", "XDG_CACHE_HOME", "HF_HOME", "TORCHINDUCTOR_CACHE_DIR")}
    done = _process("generate", "--max-new-tokens", "3", *flags, folder=tmp_path, **home)
    lines = [line for line in done.stderr.splitlines() if line[:1] not in "┌│└├"]
    assert done.returncode == 0
    assert lines == ([] if flags else ["loading demo_model", "compiling, once on this machine"])
    assert done.stdout.strip()


def test_the_messages_of_other_packages_are_hidden_by_their_text_and_for_a_while(
    caplog: pytest.LogCaptureFixture
) -> None:
    advice = "TensorFloat32 tensor cores for float32 matrix multiplication available but not enabled. Consider"
    builder = logging.getLogger("torch.utils.cpp_extension")
    with third_party.hidden():
        warnings.warn(advice, UserWarning, stacklevel=1)
        builder.warning("No CUDA runtime is found, using CUDA_HOME=%r", "/usr")
        with pytest.warns(UserWarning, match="of another kind"):
            warnings.warn("of another kind", UserWarning, stacklevel=1)
        builder.warning("of another kind")
    with pytest.warns(UserWarning, match="TensorFloat32"):
        warnings.warn(advice, UserWarning, stacklevel=1)
    builder.warning("No CUDA runtime is found")
    assert caplog.messages == ["of another kind", "No CUDA runtime is found"]
