"""Laws of rows: each reads as if it were alone, and branches begin where they were forked."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from tests.context_models import build, some_tokens
from torch_xlstm_ops.context import Batch, ChatSession, StatePool, prefill
from torch_xlstm_ops.models import transformers as adapter

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> Any:
    return build()


@pytest.fixture
def pool(model: Any) -> StatePool:
    return StatePool(model, host_bytes=1 << 24)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Collect the shapes of what the model reads."""
    original, shapes = adapter.forward_last, []

    def read(model: Any, ids: torch.Tensor, cache: Any) -> adapter.Output:
        shapes.append(tuple(ids.shape))
        return original(model, ids, cache)

    monkeypatch.setattr(adapter, "forward_last", read)
    return shapes


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_rows_of_any_lengths_read_as_if_each_were_alone(
    model: Any, pool: StatePool, read: list[tuple[int, ...]]
) -> None:
    prompts = [some_tokens(count, seed=count) for count in (5, 40, 17)]
    batch = pool.batch(prompts)
    read.clear()
    added = [some_tokens(count, seed=50 + count) for count in (3, 0, 9)]
    batch.read(added)
    assert read == [(2, 3), (1, 6)]
    batch.read([[1], [2], [3]])
    assert read[2:] == [(3, 1)]
    for row, (prompt, more, last) in enumerate(zip(prompts, added, (1, 2, 3), strict=True)):
        alone = prefill(model, [*prompt, *more, last])
        assert batch.tokens[row].tolist() == [*prompt, *more, last]
        close(batch.logits[row], alone.logits)
        for a, b in zip(batch.snapshot(row).layers, alone.layers, strict=True):
            for x, y in zip(a, b, strict=True):
                close(x, y)


def test_branches_of_one_state_part_and_the_chosen_one_is_merged_back(
    model: Any, pool: StatePool, read: list[tuple[int, ...]]
) -> None:
    prompt = some_tokens(40)
    fork = pool.batch([prompt] * 3)
    assert [shape[0] for shape in read] == [1], "the prompt is read once"
    fork.read([[4], [5, 6], [7]])
    chosen = fork.select([1])
    assert len(chosen) == 1
    chosen.read([[8]])
    assert fork.tokens[1].tolist() == [*prompt, 5, 6], "the others stay where they are"
    chosen.put(pool)
    read.clear()
    found = pool.read([*prompt, 5, 6, 8])
    assert read == []
    close(found.logits, prefill(model, [*prompt, 5, 6, 8]).logits)


def test_a_batch_leaves_its_snapshots_alone(model: Any) -> None:
    tokens = some_tokens(20)
    snapshot = prefill(model, tokens)
    before = snapshot.layers[1].c.clone()
    Batch(model, [snapshot, snapshot], [tokens, tokens]).read([[1], [2]])
    assert torch.equal(snapshot.layers[1].c, before)


def test_rows_that_find_no_memory_are_read_in_halves(pool: StatePool, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [some_tokens(8, seed=seed) for seed in (1, 2)]
    added = [some_tokens(200, seed=seed) for seed in (3, 4)]
    expected = pool.batch(prompts).read(added)
    original, shapes = adapter.forward_last, []

    def read(model: Any, ids: torch.Tensor, cache: Any) -> adapter.Output:
        shapes.append(tuple(ids.shape))
        if ids.numel() > 128:
            adapter.layers(cache)[0][0].add_(1)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(model, ids, cache)

    batch = pool.batch(prompts)
    batch._piece.tokens = 256
    monkeypatch.setattr(adapter, "forward_last", read)
    with pytest.warns(RuntimeWarning, match="the prompt is read 128 tokens at a time"):
        close(batch.read(added), expected)
    assert shapes == [(2, 128), (2, 64), (2, 64), (2, 64), (2, 8)]


def test_bad_rows_are_told(model: Any) -> None:
    snapshot = prefill(model, some_tokens(20))
    with pytest.raises(ValueError, match=r"tokens must be those before the snapshots, \[20\] each .* got \[19\]"):
        Batch(model, [snapshot], [some_tokens(19)])
    with pytest.raises(ValueError, match=r"and one row at least, got \[\]"):
        Batch(model, [], [])
    with pytest.raises(ValueError, match="tokens must be 1 rows, got 2"):
        Batch(model, [snapshot], [some_tokens(20)]).read([[1], [2]])


def test_reading_on_from_a_written_state_is_reading_it_all(model: Any, pool: StatePool) -> None:
    tokens = some_tokens(90)
    for count in (30, 31, 90):
        close(pool.read(tokens[:count]).logits, prefill(model, tokens[:count]).logits)
    assert pool.stats().hits == 2


def test_the_documented_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = (Path(__file__).parent.parent / "torch_xlstm_ops/docs/context.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", document, re.S) if "ChatSession" in block)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "BIG.txt").write_text("import os\n" * 20, encoding="utf-8")
    scope: dict[str, Any] = {}
    exec(code, scope)
    assert scope["pool"].stats().disk.states > 3
    assert len(scope["chat"].tokens) == 10 + 20


# Conversation


class Letters:
    """A tokenizer of the first 64 characters from @ on, with a mark at the beginning of a text."""

    eos_token_id = 1

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [0] * add_special_tokens + [ord(letter) - 64 for letter in text]}

    def decode(self, tokens: list[int], *, skip_special_tokens: bool) -> str:
        return "".join(chr(64 + token) for token in tokens)


def test_a_conversation_reads_each_turn_once_and_replies_as_one_prompt_would(
    model: Any, pool: StatePool, read: list[tuple[int, ...]]
) -> None:
    chat = ChatSession(pool, Letters(), ends=())
    first = chat.say("HELLO", 7)
    assert sum(shape[1] for shape in read) == 6 + 7
    read.clear()
    second = chat.say("AGAIN", 3)
    assert sum(shape[1] for shape in read) == 5 + 3
    assert (len(first), len(second)) == (7, 3)
    tokens = [0, *Letters()("HELLO" + first + "AGAIN", add_special_tokens=False)["input_ids"]]
    for letter in second:
        token = int(prefill(model, tokens).logits.argmax())
        assert chr(64 + token) == letter
        tokens.append(token)
    assert chat.tokens == tokens


def test_a_turn_can_be_undone_and_a_branch_goes_its_own_way(pool: StatePool, read: list[tuple[int, ...]]) -> None:
    chat = ChatSession(pool, Letters(), ends=())
    chat.say("HELLO", 2)
    before = chat.tokens[:]
    other = chat.branch()
    reply = chat.say("YES", 4)
    chat.undo()
    assert chat.tokens == other.tokens == before
    read.clear()
    assert chat.say("YES", 4) == reply
    assert sum(shape[1] for shape in read) == 4, "what was said before is known"
    other.say("NO", 4)
    assert other.tokens[: len(before)] == before
    assert other.tokens != chat.tokens
    other.undo()
    other.undo()
    assert other.tokens == []
    with pytest.raises(IndexError):
        other.undo()


def test_a_conversation_goes_on_in_another_process(model: Any, tmp_path: Path, read: list[tuple[int, ...]]) -> None:
    chat = ChatSession(StatePool(model, tmp_path), Letters(), ends=())
    chat.say("HELLO", 5)
    resumed = ChatSession(StatePool(build(), tmp_path), Letters(), tokens=chat.tokens, ends=())
    read.clear()
    assert resumed.say("B", 2) == chat.say("B", 2)
    assert [shape[1] for shape in read[:3]] == [1, 1, 1]


def test_a_reply_ends_at_an_end_token(pool: StatePool) -> None:
    sequence = iter([5, 6, 1, 7])
    chat = ChatSession(pool, Letters(), choose=lambda logits: next(sequence))
    assert chat.say("A") == "EF"
    assert chat.tokens == [0, 1, 5, 6]
