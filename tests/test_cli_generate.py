"""Laws of `generate`: the text is the model's, and the clock is read after the device has finished."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
import torch

from tests.cli_models import (
    CPU,
    PROMPT,
    clean_settings,
    loaded,
    model_directory,
    reference,
    text_and_table,
    write,
)
from tests.conftest import Command
from torch_xlstm_ops import config, trace
from torch_xlstm_ops.cli.generation import meter, prompt, sampling, stream
from torch_xlstm_ops.cli.shared import loading
from torch_xlstm_ops.context import piece_size
from torch_xlstm_ops.runtime import devices

__all__ = ["clean_settings", "loaded", "model_directory", "write"]  # fixtures
pytestmark = pytest.mark.usefixtures("one_thread")


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
    third = prompt.encode(loaded, PROMPT)[2]
    monkeypatch.setattr(stream, "generate_tokens", lambda *a: (t for t in (third, third, 256, third)))
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
    tokens = prompt.encode(loaded, PROMPT * 5)
    seen: list[torch.Tensor] = []

    def logits() -> torch.Tensor:
        done: list[int] = []
        with stream.prepared(loaded):
            generated = stream.generate_tokens(loaded, tokens, lambda x: seen.append(x) or 0, 1, meter.Meter(CPU),
                                     lambda step: done.append(step.position))
            assert list(generated) == [0]
        progress.append(done)
        return seen[-1]

    progress: list[list[int]] = []
    whole = logits()
    monkeypatch.setitem(piece_size.PIECE_TOKENS, "cpu", 30)
    torch.testing.assert_close(logits(), whole, rtol=1e-4, atol=1e-5)
    assert (len(tokens), progress) == (80, [[], [30, 60, 80]])


def test_warm_up_and_preparation_leave_the_model_as_it_was(loaded: loading.Loaded) -> None:
    blocks, head = loaded.model.backbone.blocks, loaded.model.get_output_embeddings()
    tokens = prompt.encode(loaded, PROMPT)
    with trace.record() as recording, stream.prepared(loaded):
        assert stream.warm_up(loaded, tokens) == ((), (), ())
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
