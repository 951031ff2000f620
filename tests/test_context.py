"""Laws of long prefill: pieces are the whole, memory stays, and the place is never lost."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from tests.context_models import SEGMENT, Interrupting, build, equal, some_tokens
from torch_xlstm_ops import config
from torch_xlstm_ops.context import StreamError, codec, piece_size, prefill, restore, state_file, states, text_tokens
from torch_xlstm_ops.models import transformers as adapter
from torch_xlstm_ops.patch import patch
from torch_xlstm_ops.runtime import devices, files

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> Any:
    return build()


# Pieces


@pytest.mark.smoke
def test_a_prompt_in_pieces_gives_the_models_own_logits(model: Any) -> None:
    tokens = some_tokens(100)
    with torch.no_grad():
        whole = model(input_ids=torch.tensor([tokens]), use_cache=True)
    found = prefill(model, tokens, segment=SEGMENT)
    assert found.position == 100
    torch.testing.assert_close(found.logits, whole.logits[0, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cut", [SEGMENT, 2 * SEGMENT, 3 * SEGMENT])
def test_a_reading_cut_at_a_boundary_is_the_whole_reading_bit_for_bit(model: Any, cut: int) -> None:
    tokens = some_tokens(110)
    whole = prefill(model, tokens, segment=SEGMENT)
    first = prefill(model, tokens[:cut], segment=SEGMENT)
    assert equal(prefill(model, tokens[cut:], start=first), whole)


@pytest.mark.slow  # compiles
def test_a_reading_on_our_operators_can_be_cut_too(model: Any, tmp_path: Path) -> None:
    tokens = some_tokens(110)
    plain = prefill(model, tokens, segment=SEGMENT)
    with patch("transformers"):
        whole = prefill(model, tokens, segment=SEGMENT)
        first = prefill(model, tokens[:64], segment=SEGMENT, file=tmp_path / "state")
        assert equal(prefill(model, tokens[64:], start=first), whole)
        assert equal(prefill(model, tokens, file=tmp_path / "state"), whole)
    torch.testing.assert_close(whole.logits, plain.logits, rtol=1e-4, atol=1e-5)


def test_every_kind_of_tokens_gives_the_same(model: Any) -> None:
    tokens = some_tokens(70)
    whole = prefill(model, tokens, segment=SEGMENT)
    for given in (tuple(tokens), torch.tensor(tokens), iter(tokens), (t for t in tokens)):
        assert equal(prefill(model, given, segment=SEGMENT), whole)


def test_the_cache_of_a_snapshot_goes_on_where_it_was_taken_and_leaves_it_alone(model: Any) -> None:
    tokens = some_tokens(40)
    snapshot = prefill(model, tokens, segment=SEGMENT)
    before = snapshot.layers[0].c.clone()
    with torch.no_grad():
        cache = restore(model, [snapshot])
        following = adapter.forward(model, torch.tensor([[5]]), cache).logits[0, -1]
        whole = model(input_ids=torch.tensor([[*tokens, 5]]), use_cache=True).logits[0, -1]
    assert adapter.position(cache) == 41
    torch.testing.assert_close(following, whole, rtol=1e-4, atol=1e-5)
    assert torch.equal(snapshot.layers[0].c, before)


def test_progress_counts_to_the_end_and_knows_the_total_of_what_has_a_length(model: Any) -> None:
    seen: list[Any] = []
    prefill(model, some_tokens(70), segment=SEGMENT, progress=seen.append)
    assert [(step.position, step.total) for step in seen] == [(32, 70), (64, 70), (70, 70)]
    assert all(step.tokens_per_second > 0 for step in seen)
    assert seen[-1].seconds_left == 0
    prefill(model, iter(some_tokens(33)), segment=SEGMENT, progress=seen.append)
    assert (seen[-1].total, seen[-1].seconds_left) == (None, None)


CHILD = """
import sys, torch
from tests.context_models import build
from torch_xlstm_ops.context import prefill
torch.set_num_threads(1)

def peak(count):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts again
    prefill(model, (i * 7 % 64 for i in range(count)), segment=64)
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))

model = build()
peak(512)
print(peak(512), peak(8192))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="a peak of memory needs Linux's /proc")
def test_memory_does_not_grow_with_the_stream() -> None:
    run = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, timeout=300, check=True,
                         cwd=Path(__file__).parent.parent)
    short, long = map(int, run.stdout.split())
    assert long - short < 4 << 20


# Interrupted


@pytest.mark.smoke
def test_an_interrupted_reading_goes_on_from_its_file_bit_for_bit(model: Any, tmp_path: Path) -> None:
    tokens, file = some_tokens(200), tmp_path / "state"
    whole = prefill(model, tokens, segment=SEGMENT)
    with pytest.raises(KeyboardInterrupt):
        prefill(model, Interrupting(tokens, 150, KeyboardInterrupt()), segment=SEGMENT, file=file)
    assert codec.decode(state_file.read(file)).position == 128
    steps: list[int] = []
    assert equal(prefill(model, tokens, file=file, progress=lambda step: steps.append(step.position)), whole)
    assert steps == [160, 192, 200]
    assert equal(prefill(model, tokens, file=file, progress=lambda step: pytest.fail("read again")), whole)


def test_the_file_is_written_every_so_many_pieces(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    monkeypatch.setattr(state_file, "write", lambda path, content: written.append(len(content)))
    prefill(model, some_tokens(10 * SEGMENT + 1), segment=SEGMENT, file=tmp_path / "state", save_every=4)
    assert len(written) == 3  # after 4 and 8 pieces, and at the end


def test_a_stream_that_raises_keeps_its_place(model: Any) -> None:
    tokens = some_tokens(100)
    whole = prefill(model, tokens, segment=SEGMENT)
    with pytest.raises(StreamError, match="of tokens raised OSError after 75 tokens: the line is dead") as caught:
        prefill(model, Interrupting(tokens, 75, OSError("the line is dead")), segment=SEGMENT)
    error = caught.value
    assert (error.position, error.snapshot.position, list(error.waiting)) == (75, 64, tokens[64:75])
    assert equal(prefill(model, [*error.waiting, *tokens[75:]], start=error.snapshot), whole)


def test_a_file_of_other_tokens_is_refused_and_kept(model: Any, tmp_path: Path) -> None:
    file = tmp_path / "state"
    prefill(model, some_tokens(64), segment=SEGMENT, file=file)
    content = file.read_bytes()
    for others in (some_tokens(100, seed=1), some_tokens(40)):
        with pytest.raises(ValueError, match=r"tokens must begin with the 64 that the state in .* was saved after"):
            prefill(model, others, file=file)
    assert file.read_bytes() == content


def test_a_damaged_file_is_told_and_everything_is_read_again(model: Any, tmp_path: Path) -> None:
    tokens, file = some_tokens(100), tmp_path / "state"
    whole = prefill(model, tokens, segment=SEGMENT, file=file)
    for content in (file.read_bytes()[:1000], b"", file.read_bytes()[:-1] + b"\0"):
        file.write_bytes(content)
        with pytest.warns(RuntimeWarning, match="the prompt is read from its first token: .*state"):
            assert equal(prefill(model, tokens, segment=SEGMENT, file=file), whole)


def test_a_file_that_is_no_state_is_not_written_over(model: Any, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("what I did today " * 500)
    with pytest.raises(ValueError, match=r"file must be a state that was saved, got .*notes, which is something else"):
        prefill(model, some_tokens(40), file=tmp_path / "notes")
    assert (tmp_path / "notes").read_text().startswith("what I did today")


def test_a_full_disk_is_told_and_reading_goes_on(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.warns(RuntimeWarning, match="could not save the state after 50 tokens to .*: No space left on device"):
        found = prefill(model, some_tokens(50), segment=64, file=tmp_path / "state")
    assert found.position == 50
    assert list(tmp_path.iterdir()) == []


# MemoryTiers


def limited(monkeypatch: pytest.MonkeyPatch, most: int, error: BaseException) -> list[int]:
    """Let the model fail on more than `most` tokens, its first layer written already; return what it read."""
    original, sizes = adapter.forward_last, []

    def read(model: Any, ids: torch.Tensor, cache: Any) -> adapter.Output:
        if ids.shape[1] > most:
            adapter.layers(cache)[0][0].add_(1)
            raise error
        sizes.append(ids.shape[1])
        return original(model, ids, cache)

    monkeypatch.setattr(adapter, "forward_last", read)
    return sizes


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory."), MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried ..."),
], ids=["device", "python", "host"])
def test_no_memory_means_one_size_down_and_the_same_result(
    model: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    tokens = some_tokens(150)
    whole = prefill(model, tokens, segment=16)
    sizes = limited(monkeypatch, 16, error)
    with pytest.warns(RuntimeWarning) as said:
        found = prefill(model, tokens, segment=64)
    assert [str(w.message).split(":")[0] for w in said] == [
        "the prompt is read 32 tokens at a time from now on", "the prompt is read 16 tokens at a time from now on"]
    assert sizes == [16] * 9 + [6]
    assert all(torch.equal(a, b) for a, b in zip(found.layers[1], whole.layers[1], strict=True))
    assert (found.segment, whole.segment) == (None, 16)


def test_no_size_that_fits_is_the_error_itself(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    limited(monkeypatch, 1, torch.OutOfMemoryError("CUDA out of memory."))
    with pytest.raises(torch.OutOfMemoryError), pytest.warns(RuntimeWarning):
        prefill(model, some_tokens(50), segment=64)


def test_other_errors_are_not_taken_for_a_lack_of_memory(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    limited(monkeypatch, 16, RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        prefill(model, some_tokens(50), segment=64)


def test_the_size_follows_the_free_memory(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    each = piece_size.bytes_per_token(model)
    free = [each * 4096 * 2]
    monkeypatch.setattr(devices, "available", lambda device: free[0])
    found = piece_size.PieceSize(model, torch.device("cpu"))
    assert found.tokens == 2048
    for now, size, told in ((each * 600 * 2, 512, True), (each * 900 * 2, 512, False), (each * 2100 * 2, 1024, True)):
        free[0] = now
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found.adapt()
        assert (found.tokens, bool(said)) == (size, told)
    fixed = piece_size.PieceSize(model, torch.device("cpu"), 4096, fixed=True)
    fixed.adapt()
    assert fixed.tokens == 4096


def test_pieces_are_whole_segments_of_the_schedule() -> None:
    for segment, size in ((None, 2048), (1000, 2000), (6000, 6000)):
        with config.use(segment=segment):
            assert piece_size.default_piece_tokens(torch.device("cpu")) == size


def test_memory_that_can_be_had_is_no_more_than_there_is() -> None:
    free = devices.available(torch.device("cpu"))
    budget = devices.memory(torch.device("cpu")).budget
    assert free is None or budget is None or 0 < free <= budget


# Whose state


def test_another_models_state_is_refused(model: Any, tmp_path: Path) -> None:
    file, tokens = tmp_path / "state", some_tokens(40)
    snapshot = prefill(model, tokens, segment=SEGMENT, file=file)
    for other in (build(seed=1), build(dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="snapshot must be of the model with identity"):
            restore(other, [snapshot])
        with pytest.raises(ValueError, match="snapshot must be of the model with identity"):
            prefill(other, tokens, file=file)


def test_states_of_another_dtype_are_refused(model: Any) -> None:
    snapshot = prefill(model, some_tokens(40), segment=SEGMENT)
    layers = tuple(states.MLSTMState(*(tensor.double() for tensor in layer)) for layer in snapshot.layers)
    with pytest.raises(TypeError, match=r"must hold states of torch.float32 .* got torch.float64"):
        restore(model, [states.dataclasses.replace(snapshot, layers=layers)])


def test_identity_follows_config_and_weights_and_nothing_else() -> None:
    a, b = build(), build()
    assert states.identity(a) == states.identity(b) != states.identity(build(seed=1))
    b.config.use_cache = not b.config.use_cache
    assert states.identity(build()) == states.identity(b)
    with torch.no_grad():
        b.lm_head.weight[0, 0] += 1
    assert states.identity(b) != states.identity(a)
    assert states.identity(build(dtype=torch.bfloat16)) != states.identity(a)


def test_bad_arguments_are_told(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tokens must hold at least one, got none"):
        prefill(model, [])
    with pytest.raises(ValueError, match="tokens must be from 0 up and below the model's 64, got 64 at position 2"):
        prefill(model, [1, 2, 64])
    with pytest.raises(ValueError, match="segment must be a whole number of at least 1, got 0"):
        prefill(model, [1], segment=0)
    with pytest.raises(ValueError, match="save_every must be a whole number of at least 1, got 0"):
        prefill(model, [1], save_every=0)
    with pytest.raises(ValueError, match="start must come without pool and file"):
        prefill(model, [1], start=prefill(model, [1]), file=tmp_path / "state")


# Texts


class Letters:
    """A tokenizer with a mark at the beginning of a text."""

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [0] * add_special_tokens + [ord(letter) for letter in text]}


@pytest.mark.parametrize("block", [1, 3, 7, 1000])
def test_a_file_in_blocks_is_the_whole_text(tmp_path: Path, block: int) -> None:
    text = "one\ntwo é\r\n\nand a long line that is longer than the block\nend"
    (tmp_path / "text").write_text(text, encoding="utf-8", newline="")
    assert list(text_tokens(tmp_path / "text", Letters(), block)) == [0, *map(ord, text.replace("\r", ""))]
