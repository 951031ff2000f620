"""Laws of `generate` with long prompts and kept states, and of `cache`: the text stays the same."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from tests.cli_models import (  # the tiny model and the ways to run it
    PROMPT,
    clean_settings,
    error,
    loaded,
    model_directory,
    reference,
    text_and_table,
    write,
)
from tests.conftest import Command
from torch_xlstm_ops.cli.generation import progress, prompt, prompt_text, stream
from torch_xlstm_ops.cli.shared import loading
from torch_xlstm_ops.context import StatePool, piece_size, prefill, reader, state_file, states, tokens
from torch_xlstm_ops.models import transformers as adapter

__all__ = ["clean_settings", "loaded", "model_directory", "write"]
pytestmark = pytest.mark.usefixtures("one_thread")
LONG = PROMPT * 8


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a piece be 32 tokens, and a file of more than 64 bytes be long."""
    monkeypatch.setitem(piece_size.PIECE_TOKENS, "cpu", 32)
    monkeypatch.setattr(prompt_text, "TEXT_BLOCK", 64)
    monkeypatch.setattr(tokens.text_tokens, "__defaults__", (64,))


@pytest.fixture
def expected(loaded: loading.Loaded, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("tests.cli_models.PROMPT", LONG)
    return reference(loaded, 12)


@pytest.fixture
def long(run: Command, model_directory: Path, tmp_path: Path) -> Command:
    """Run `generate` on a long file."""
    file = tmp_path / "long.txt"
    file.write_text(LONG)

    def long(*arguments: object) -> tuple[int, str, str]:
        return run("generate", "--model", model_directory, "--prompt-file", file, "--no-patch", "--max-new-tokens", 12,
                   *arguments)

    return long


def without_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read the prompt only once: the warm-up reads it the same way."""
    monkeypatch.setattr(stream, "warm_up", lambda *arguments, **options: stream.WarmUp((), (), ()))


def one_token_only(forward_last: Callable[..., adapter.Output]) -> Callable[..., adapter.Output]:
    """Return a model call that fails for more than a decoded token."""
    def decode_only(model: Any, ids: torch.Tensor, cache: Any) -> adapter.Output:
        assert ids.shape == (1, 1), "the prompt was read again"
        return forward_last(model, ids, cache)

    return decode_only


def test_a_long_file_is_read_without_being_held(long: Command, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt, "encode", lambda *a: pytest.fail("the whole text was encoded"))
    status, *written = long()
    text, table = text_and_table(*written)
    assert (status, text) == (0, expected)
    assert table["prompt tokens"] == str(len(LONG))


def test_a_long_file_must_be_utf8_to_its_end(run: Command, tmp_path: Path) -> None:
    file = tmp_path / "broken"
    file.write_bytes(b"a" * 129 + "é".encode()[:1] + b"b" * 100)
    assert error(run("generate", "--prompt-file", file)).endswith("invalid continuation byte at byte 129")
    file.write_bytes(b"a" * 127 + "€".encode() + b"b" * 60 + "é".encode()[:1])
    assert error(run("generate", "--prompt-file", file)).endswith("unexpected end of data at byte 190")


def test_a_pool_is_filled_and_used_and_the_text_is_the_same(
    long: Command, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert text_and_table(*long("--pool", tmp_path / "pool")[1:])[0] == expected
    without_warm_up(monkeypatch)
    monkeypatch.setattr(adapter, "forward_last", one_token_only(adapter.forward_last))
    text, table = text_and_table(*long("--pool", tmp_path / "pool")[1:])
    assert text == expected
    assert (table["new tokens"], table["prompt tokens"], table["prompt tokens read"]) == ("12", "128", "0")
    assert float(table["time to first token s"]) > 0


def test_an_interrupted_prompt_is_resumed(
    long: Command, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_warm_up(monkeypatch)
    original, count = reader.PromptReader.advance, [0]

    def advance(self: reader.PromptReader) -> bool:
        count[0] += 1
        if count[0] == 3:
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(reader.PromptReader, "advance", advance)
    file = tmp_path / "state"
    status, *written = long("--resume", file)
    assert (status, text_and_table(*written)[1]["ended by"]) == (130, "interrupt")
    assert written[1].endswith(f"\ninterrupted: {file} holds the state after 64 of the prompt's 128 tokens; "
                               "run the same command to resume\n")
    assert state_file.read(file).about["position"] == "64"
    assert text_and_table(*long("--resume", file)[1:])[0] == expected
    assert count[0] == 3 + 3  # two pieces, and the end


def test_an_interrupt_before_anything_was_read_says_that_nothing_is_kept(
    long: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_warm_up(monkeypatch)

    def advance(self: reader.PromptReader) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(reader.PromptReader, "advance", advance)
    status, _, err = long("--resume", tmp_path / "state")
    assert status == 130
    assert err.endswith(f"\ninterrupted before the first piece of the prompt was read: {tmp_path / 'state'} was "
                        "not written; run the same command again\n")


def test_a_state_of_another_prompt_is_one_line(write: Command, long: Command, tmp_path: Path) -> None:
    long("--resume", tmp_path / "state")
    status, out, err = write("--resume", tmp_path / "state")
    assert (status, out) == (2, "")
    assert re.search(r"error: --resume: tokens must begin with the 128 that the state in .* got others$", err.strip())
    assert error(write("--resume", tmp_path)).startswith("--resume must be a file that can be written")


def test_a_pool_that_is_a_file_is_one_line(write: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert error(write("--pool", tmp_path / "file")).startswith("--pool must be a folder, or one to be made, got")


def test_progress_tells_speed_and_time_left(
    long: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", -1)
    lines = [line for line in long()[2].splitlines() if line.startswith("prefill")]
    assert len(lines) == 4
    assert re.fullmatch(r"prefill 96 of 128 tokens, \d+ tokens/s, \d+ s left", lines[2])


# The command `cache`


@pytest.fixture
def pool(loaded: loading.Loaded, tmp_path: Path) -> Path:
    """Make a folder of four states."""
    pool = StatePool(loaded.model, tmp_path / "pool")
    prefill(loaded.model, list(LONG.encode()[:100]), pool=pool)
    return tmp_path / "pool"


def test_ls_and_stats_tell_what_is_there(run: Command, pool: Path, loaded: loading.Loaded) -> None:
    status, out, _ = run("cache", "ls", "--pool", pool)
    lines = out.splitlines()
    assert status == 0
    assert lines[0].split() == ["model", "tokens", "piece", "bytes", "used"]
    assert [line.split()[:3] for line in lines[1:]] == [
        [states.identity(loaded.model)[:12], str(position), "32"] for position in (100, 96, 64, 32)]
    out = run("cache", "stats", "--pool", pool)[1]
    assert out.splitlines()[-1].split()[:4] == ["all", "4", "0", "100"]


def test_prune_keeps_within_the_bytes(run: Command, pool: Path) -> None:
    size = next(pool.rglob("*.safetensors")).stat().st_size
    status, out, _ = run("cache", "prune", "--pool", pool, "--bytes", 2 * size + 100)
    assert (status, out.split(";")[0]) == (0, f"2 states removed, {2 * size} bytes")
    assert len(list(pool.rglob("*.safetensors"))) == 2
    assert run("cache", "prune", "--pool", pool, "--bytes", "1G")[1].startswith("0 states removed")


def test_verify_finds_what_is_damaged(run: Command, pool: Path) -> None:
    assert run("cache", "verify", "--pool", pool)[:2] == (0, "4 states, 0 damaged\n")
    file = sorted(pool.rglob("*.safetensors"))[0]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    status, out, _ = run("cache", "verify", "--pool", pool)
    assert status == 1
    assert out.startswith(str(file))
    assert run("cache", "verify", "--pool", pool, "--remove")[1].endswith("4 states, 1 damaged and removed\n")
    assert run("cache", "verify", "--pool", pool)[:2] == (0, "3 states, 0 damaged\n")


def test_bad_flags_of_cache_are_one_line(run: Command, pool: Path, tmp_path: Path) -> None:
    assert error(run("cache", "ls", "--pool", tmp_path / "none")).endswith("none, which is no folder")
    assert error(run("cache", "prune", "--pool", pool)) == (
        "prune must come with --bytes SIZE, what it leaves: a number of bytes, or one with K, M, G or T")
    assert error(run("cache", "prune", "--pool", "nowhere")).startswith("prune must come with --bytes SIZE")
    assert error(run("cache", "prune", "--pool", pool, "--bytes", "1.5G")).endswith("got '1.5G'")
    assert error(run("cache", "ls", "--pool", pool, "--bytes", "1")) == "--bytes must come with prune, got ls"
    assert error(run("cache", "ls", "--pool", pool, "--remove")) == "--remove must come with verify, got ls"
    assert "invalid choice: 'rm'" in error(run("cache", "rm", "--pool", pool))
