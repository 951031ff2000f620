"""Laws of the state pool: the longest beginning is found, nothing wrong ever is, and budgets hold."""

from __future__ import annotations

import threading
from array import array
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from tests.context_models import SEGMENT, Interrupting, build, equal, some_tokens
from torch_xlstm_ops.context import StatePool, Storage, StreamError, codec, prefill, state_file, states
from torch_xlstm_ops.context.pool.memory import MemoryTiers
from torch_xlstm_ops.context.tokens import TokenDigest, as_array, digest
from torch_xlstm_ops.models import transformers as adapter
from torch_xlstm_ops.patch import patch

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> Any:
    return build()


class Counting:
    """Counts the tokens that a model reads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tokens, original = 0, adapter.forward_last

        def read(model: Any, ids: torch.Tensor, cache: Any) -> adapter.Output:
            self.tokens += ids.numel()
            return original(model, ids, cache)

        monkeypatch.setattr(adapter, "forward_last", read)

    def since(self) -> int:
        found, self.tokens = self.tokens, 0
        return found


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    return Counting(monkeypatch)


# Finding


@pytest.fixture(params=["host", "device", "disk"])
def pool(request: pytest.FixtureRequest, model: Any, tmp_path: Path) -> StatePool:
    """Make a pool of one tier."""
    budgets = {"device_bytes": 0, "host_bytes": 0} | {f"{request.param}_bytes": 1 << 24}
    return StatePool(model, tmp_path if request.param == "disk" else None, **budgets)


@pytest.mark.smoke
def test_a_second_reading_resumes_at_the_last_common_boundary_bit_for_bit(
    model: Any, pool: StatePool, counting: Counting
) -> None:
    tokens = some_tokens(150)
    whole = prefill(model, tokens, segment=SEGMENT)
    counting.since()
    assert equal(prefill(model, tokens, segment=SEGMENT, pool=pool), whole)
    assert counting.since() == 150
    assert equal(prefill(model, tokens, segment=SEGMENT, pool=pool), whole)
    assert counting.since() == 0, "the very prompt is kept"
    longer = [*tokens, 1, 2]
    assert equal(prefill(model, longer, segment=SEGMENT, pool=pool), prefill(model, longer, segment=SEGMENT))
    assert counting.since() == 24 + 152
    edited = [*tokens[:100], 63 - tokens[100], *tokens[101:]]
    assert equal(prefill(model, edited, segment=SEGMENT, pool=pool), prefill(model, edited, segment=SEGMENT))
    assert counting.since() == 150 - 96 + 150
    assert prefill(model, some_tokens(60, seed=9), segment=SEGMENT, pool=pool).position == 60
    assert counting.since() == 60
    assert pool.stats()[3:5] == (3, 2)


def test_a_stream_resumes_too_and_looks_no_further_than_what_is_kept(
    model: Any, pool: StatePool, counting: Counting
) -> None:
    tokens = some_tokens(200)
    whole = prefill(model, tokens, segment=SEGMENT)
    prefill(model, tokens[:100], segment=SEGMENT, pool=pool)
    counting.since()
    with pytest.raises(StreamError) as caught:
        prefill(model, Interrupting(tokens, 101, OSError("gone")), segment=SEGMENT, pool=pool)
    assert (caught.value.position, caught.value.snapshot.position) == (101, 96)
    assert counting.since() == 0
    assert equal(prefill(model, iter(tokens), segment=SEGMENT, pool=pool), whole)
    assert counting.since() == 200 - 96


def test_pieces_of_another_size_are_not_taken_for_these(model: Any, pool: StatePool) -> None:
    tokens = some_tokens(128)
    prefill(model, tokens, segment=64, pool=pool)
    assert pool.find(tokens, segment=32) is None
    assert pool.find(tokens, segment=64).position == 128
    assert pool.find(tokens[:100]).position == 64, "anywhere, where no size is asked for"
    prefill(model, tokens, segment=32, pool=pool)
    assert pool.find(tokens[:100], segment=32).position == 96
    assert pool.find(tokens[:100], segment=64).position == 64


def test_a_tail_is_found_for_its_own_prompt_alone(model: Any, pool: StatePool) -> None:
    tokens = some_tokens(100)
    prefill(model, tokens, segment=SEGMENT, pool=pool)
    assert pool.find(tokens, segment=SEGMENT).position == 100
    assert pool.find([*tokens, 1], segment=SEGMENT).position == 96
    assert pool.find([*tokens, 1]).position == 100
    assert pool.longest == 100


def test_a_file_and_a_pool_give_the_one_that_knows_more(
    model: Any, pool: StatePool, tmp_path: Path, counting: Counting
) -> None:
    tokens, file = some_tokens(160), tmp_path / "state"
    whole = prefill(model, tokens, segment=SEGMENT)
    prefill(model, tokens[:64], segment=SEGMENT, file=file)
    counting.since()
    assert equal(prefill(model, tokens[:96], file=file, pool=pool), prefill(model, tokens[:96], segment=SEGMENT))
    assert counting.since() == 32 + 96
    prefill(model, tokens[:128], segment=SEGMENT, pool=pool)
    counting.since()
    assert equal(prefill(model, tokens, file=file, pool=pool), whole)
    assert counting.since() == 32


# Tiers


def fill(pool: StatePool, model: Any, count: int, **options: bool) -> list[list[int]]:
    """Put `count` states, each after tokens of its own; return the tokens."""
    prompts = [some_tokens(10, seed=seed) for seed in range(100, 100 + count)]
    for tokens in prompts:
        pool.put(tokens, prefill(model, tokens), **options)
    return prompts


@pytest.fixture(scope="module")
def size(model: Any) -> int:
    return states.outline(model).nbytes


@pytest.mark.parametrize("tier", ["host", "device"])
def test_memory_lets_go_of_the_least_recently_used_within_its_budget(model: Any, size: int, tier: str) -> None:
    pool = StatePool(model, **{"device_bytes": 0, "host_bytes": 0} | {f"{tier}_bytes": 3 * size + 5})
    prompts = fill(pool, model, 3)
    assert pool.find(prompts[0]) is not None
    prompts.append(some_tokens(11))
    pool.put(prompts[3], prefill(model, prompts[3]))
    usage = getattr(pool.stats(), tier)
    assert (usage.states, usage.bytes) == (3, 3 * size)
    assert [pool.find(tokens) is not None for tokens in prompts] == [True, False, True, True]


@pytest.mark.parametrize("tier", ["host", "device"])
def test_pins_stay_and_what_they_leave_no_room_for_is_told(model: Any, size: int, tier: str) -> None:
    pool = StatePool(model, **{"device_bytes": 0, "host_bytes": 0} | {f"{tier}_bytes": 2 * size})
    first, second = fill(pool, model, 2)
    pool.pin(first)
    third = fill(pool, model, 3)[2]
    assert [pool.find(tokens) is not None for tokens in (first, second, third)] == [True, False, True]
    pool.pin(third)
    with pytest.warns(RuntimeWarning, match="could not keep a state of .* in memory: pinned states leave no room"):
        pool.put(second, prefill(model, second))
    assert pool.find(second) is None
    pool.pin(first, pinned=False)
    pool.put(second, prefill(model, second))
    assert [pool.find(tokens) is not None for tokens in (first, second, third)] == [False, True, True]
    with pytest.raises(ValueError, match="tokens must be those of a state that is kept, got 10 without a state"):
        pool.pin(first)


def test_what_memory_let_go_of_comes_back_from_the_disk(model: Any, size: int, tmp_path: Path) -> None:
    pool = StatePool(model, tmp_path, host_bytes=size, device_bytes=0)
    first, second = fill(pool, model, 2)
    snapshot = prefill(model, first)
    assert equal(pool.find(first), snapshot)
    assert pool.stats().host.states == 1
    (tmp_path / states.identity(model)).rename(tmp_path / "elsewhere")
    assert equal(pool.find(first), snapshot), "it is in memory again"
    assert pool.find(second) is None


def test_another_process_finds_what_this_one_put(model: Any, tmp_path: Path) -> None:
    tokens = fill(StatePool(model, tmp_path), model, 1, pin=True)[0]
    other = StatePool(build(), tmp_path)
    assert equal(other.find(tokens), prefill(model, tokens))
    assert (other.stats().host.pinned, other.stats().disk.pinned) == (1, 1)
    other.pin(tokens, pinned=False)
    assert (other.stats().host.pinned, other.stats().disk.pinned) == (0, 0)


def test_threads_may_share_a_pool(model: Any, size: int, tmp_path: Path) -> None:
    pool = StatePool(model, tmp_path, host_bytes=3 * size, device_bytes=2 * size, disk_bytes=5 * size + 20_000)
    prompts = [some_tokens(10, seed=seed) for seed in range(8)]
    snapshots = [prefill(model, tokens) for tokens in prompts]
    wrong: list[object] = []

    def work(start: int) -> None:
        try:
            for step in range(40):
                at = (start + step * 3) % 8
                pool.put(prompts[at], snapshots[at])
                found = pool.find(prompts[(start + step) % 8])
                if found is not None and not equal(found, snapshots[(start + step) % 8]):
                    wrong.append(step)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []
    for tier in pool.stats()[:3]:
        assert 0 < tier.bytes <= tier.budget


def test_an_empty_tree_is_left_when_everything_is_gone(model: Any, size: int) -> None:
    memory = MemoryTiers(torch.device("cpu"), 0, size)
    for seed in range(5):
        tokens = as_array(some_tokens(10, seed=seed))
        snapshot = prefill(model, tokens)
        memory.put(tokens, snapshot, codec.encode(snapshot), pin=False)
    assert [kept.position for kept in memory.prefixes(tokens)] == [10]
    assert len(memory._tree._root.children) == 1


# Fewer bits


@pytest.mark.parametrize(("kept_in", "share", "most"), [("full", 1.0, 0.0), ("bf16", 0.6, 4e-3), ("int8", 0.4, 2e-2)])
def test_fewer_bits_take_fewer_bytes_and_tell_their_error(
    model: Any, tmp_path: Path, size: int, kept_in: str, share: float, most: float
) -> None:
    tokens = some_tokens(100)
    exact = prefill(model, tokens)
    pool = StatePool(model, tmp_path, storage=kept_in, device_bytes=0)
    pool.put(tokens, exact)
    stats = pool.stats()
    assert stats.host.bytes <= share * size
    assert stats.host.bytes == codec.encoded_bytes(exact, Storage(kept_in))
    assert (stats.error > 0) == (kept_in != "full")
    for found in (pool.find(tokens), StatePool(model, tmp_path).find(tokens)):
        errors = [codec.relative_error(a, b) for exact_layer, layer in zip(exact.layers, found.layers, strict=True)
                  for a, b in zip(exact_layer, layer, strict=True)]
        assert max(errors) == stats.error <= most
        assert torch.equal(found.logits, exact.logits)
        assert all(torch.equal(a.m, b.m) for a, b in zip(exact.layers, found.layers, strict=True))


def test_a_state_of_zeros_is_kept_in_any_bits(model: Any) -> None:
    layers = tuple(states.MLSTMState(*(torch.zeros_like(t, device="cpu") for t in layer))
                   for layer in states.outline(model).layers)
    zero = states.Snapshot("", 0, "", None, layers, torch.zeros(64))
    for kept_in in Storage:
        packed = codec.encode(zero, kept_in)
        assert packed.error == 0
        assert equal(codec.decode(packed), zero)


# Bad input


def test_another_models_state_is_never_found(model: Any, tmp_path: Path) -> None:
    tokens = some_tokens(70)
    prefill(model, tokens, segment=SEGMENT, pool=StatePool(model, tmp_path))
    for other in (build(seed=1), build(dtype=torch.bfloat16)):
        pool = StatePool(other, tmp_path)
        assert pool.find(tokens) is None
        with pytest.raises(ValueError, match="snapshot must be of the pool's model"):
            pool.put(tokens, prefill(model, tokens))


def test_states_that_a_patch_made_wider_are_not_taken_for_the_others(tmp_path: Path) -> None:
    model, tokens = build(dtype=torch.bfloat16), some_tokens(20)
    own = states.identity(model)
    assert states.outline(model).layers[0].c.dtype == torch.bfloat16
    with patch("transformers"):
        assert states.outline(model).layers[0].c.dtype == torch.float32
        assert states.identity(model) != own
        wide = prefill_by_hand(model, tokens)
        pool = StatePool(model, tmp_path)
        pool.put(tokens, wide)
        assert pool.find(tokens) is not None
    assert pool.find(tokens) is None
    with pytest.raises(ValueError, match="snapshot must be of the model with identity"):
        states.restore(model, [wide])


def prefill_by_hand(model: Any, tokens: list[int]) -> states.Snapshot:
    """Return a snapshot as if `tokens` were read: nothing is compiled."""
    cache = adapter.empty_cache(model)
    return states.Snapshot(states.identity(model), len(tokens), digest(as_array(tokens)), None,
                           states.capture(cache), torch.zeros(64))


def test_new_weights_forget_the_states_of_the_old() -> None:
    model, tokens = build(), some_tokens(70)
    pool = StatePool(model, host_bytes=1 << 24)
    prefill(model, tokens, segment=SEGMENT, pool=pool)
    assert pool.find(tokens) is not None
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    assert pool.find(tokens) is None
    assert equal(prefill(model, tokens, segment=SEGMENT, pool=pool), prefill(model, tokens, segment=SEGMENT))


def test_a_state_of_other_tokens_is_refused(model: Any, pool: StatePool) -> None:
    snapshot = prefill(model, some_tokens(10))
    for tokens in (some_tokens(9), some_tokens(10, seed=1)):
        with pytest.raises(ValueError, match="snapshot must be taken after these"):
            pool.put(tokens, snapshot)


def test_a_damaged_state_on_disk_is_read_again_from_its_tokens(
    model: Any, tmp_path: Path, counting: Counting
) -> None:
    tokens = some_tokens(100)
    prefill(model, tokens, segment=SEGMENT, pool=StatePool(model, tmp_path))
    (longest,) = [path for path in tmp_path.rglob("*.safetensors") if path.name.startswith(f"{100:012d}")]
    content = bytearray(longest.read_bytes())
    content[-50] ^= 1
    longest.write_bytes(content)
    counting.since()
    with pytest.warns(RuntimeWarning, match="removed a damaged state, its tokens are read again"):
        found = prefill(model, tokens, segment=SEGMENT, pool=StatePool(model, tmp_path))
    assert counting.since() == 4, "from the boundary before"
    assert equal(found, prefill(model, tokens, segment=SEGMENT))
    assert state_file.read(longest).about["position"] == "100"


def test_a_budget_smaller_than_one_state_is_refused(model: Any, size: int, tmp_path: Path) -> None:
    for name in ("device_bytes", "host_bytes", "disk_bytes"):
        with pytest.raises(ValueError, match=f"{name} must be 0 or at least the {size} bytes of one state, got 1000"):
            StatePool(model, tmp_path, **{name: 1000})
    with pytest.raises(ValueError, match="disk_bytes must come with folder, got 5 without"):
        StatePool(model, disk_bytes=5)
    with pytest.raises(ValueError, match="'int4' is not a valid Storage"):
        StatePool(model, storage="int4")


def test_a_folder_that_cannot_be_written_is_told_and_reading_goes_on(model: Any, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    pool = StatePool(model, blocked / "folder", disk_bytes=1 << 24)
    with pytest.warns(RuntimeWarning, match="could not save a state to .*: Not a directory"):
        found = prefill(model, some_tokens(40), segment=64, pool=pool)
    assert found.position == 40
    assert pool.find(some_tokens(40)) is not None, "in memory"


def test_each_token_is_hashed_once_and_the_keys_are_those_of_the_whole(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, hashed, add = some_tokens(20 * SEGMENT), [0], TokenDigest.add

    def counted(self: TokenDigest, piece: array[int]) -> None:
        hashed[0] += len(piece)
        add(self, piece)

    pool = StatePool(model, tmp_path)
    monkeypatch.setattr(TokenDigest, "add", counted)
    prefill(model, tokens, segment=SEGMENT, pool=pool)
    assert hashed[0] == len(tokens)
    monkeypatch.undo()
    names = {path.name for path in tmp_path.rglob("*.safetensors")}
    ends = range(SEGMENT, len(tokens) + 1, SEGMENT)
    assert names == {f"{end:012d}-{digest(as_array(tokens[:end]))}-{SEGMENT}.safetensors" for end in ends}
    assert [pool.find(tokens[:end], segment=SEGMENT).position for end in ends] == list(ends)
