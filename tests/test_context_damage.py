"""Laws of files that others changed: every fault is damage, which is told, removed, and read again from the tokens.

Links are never followed out of a pool's folder, and a link that the user made for a whole file stays one.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from tests.context_models import build, equal, some_tokens
from torch_xlstm_ops.context import StatePool, codec, prefill, state_file, states
from torch_xlstm_ops.context.codec import EncodedSnapshot
from torch_xlstm_ops.context.pool.disk import DiskTier

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(os.name != "posix", reason="FIFOs and links for every user need POSIX"),
]
TOKENS = some_tokens(40)
DAMAGED = "removed a damaged state, its tokens are read again"
FROM_FIRST = "the prompt is read from its first token"


@pytest.fixture(scope="module")
def model() -> Any:
    return build()


@pytest.fixture(scope="module")
def whole(model: Any) -> states.Snapshot:
    return prefill(model, TOKENS, segment=64)


@pytest.fixture
def state(model: Any, whole: states.Snapshot, tmp_path: Path) -> Path:
    """Keep a state in a folder and return its file."""
    pool(model, tmp_path).put(TOKENS, whole)
    (file,) = tmp_path.glob("pool/*/*.safetensors")
    return file


def pool(model: Any, folder: Path) -> StatePool:
    """Return a pool without memory tiers."""
    return StatePool(model, folder / "pool", host_bytes=0, device_bytes=0, disk_bytes=1 << 24)


# Files that are not ours


def fifo(path: Path, content: bytes) -> None:
    os.mkfifo(path)


def device(path: Path, content: bytes) -> None:
    path.symlink_to("/dev/zero")


def link(path: Path, content: bytes) -> None:
    (path.parents[2] / "target").write_bytes(content)
    path.symlink_to(path.parents[2] / "target")


def sparse(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    os.truncate(path, 1 << 42)


def zeros(path: Path, content: bytes) -> None:
    path.touch()
    os.truncate(path, 1 << 35)


def nested(path: Path, content: bytes) -> None:
    header = b'{"__metadata__":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def long_header(path: Path, content: bytes) -> None:
    path.write_bytes(struct.pack("<Q", 1 << 62) + content[8:])


@pytest.mark.parametrize("plant", [fifo, device, link, sparse, zeros, nested, long_header])
def test_a_file_that_is_no_state_is_told_removed_and_replaced(
    model: Any, whole: states.Snapshot, state: Path, tmp_path: Path, plant: Callable[[Path, bytes], None]
) -> None:
    content = state.read_bytes()
    state.unlink()
    plant(state, content)
    ((_, wrong),) = DiskTier(tmp_path / "pool").verify()
    assert wrong is not None
    assert str(state) in wrong
    with pytest.warns(RuntimeWarning, match=DAMAGED):
        assert pool(model, tmp_path).find(TOKENS) is None
    assert not os.path.lexists(state)
    assert equal(prefill(model, TOKENS, segment=64, pool=pool(model, tmp_path)), whole)
    assert equal(pool(model, tmp_path).find(TOKENS), whole)
    if plant is link:
        assert (tmp_path / "target").read_bytes() == content


@pytest.mark.parametrize("plant", [fifo, link])
def test_a_put_replaces_what_is_no_state(
    model: Any, whole: states.Snapshot, state: Path, tmp_path: Path, plant: Callable[[Path, bytes], None]
) -> None:
    state.unlink()
    plant(state, b"theirs")
    pool(model, tmp_path).put(TOKENS, whole)
    assert not state.is_symlink()
    assert equal(pool(model, tmp_path).find(TOKENS), whole)
    if plant is link:
        assert (tmp_path / "target").read_bytes() == b"theirs"


def test_a_folder_at_a_states_name_is_set_aside_with_its_content(
    model: Any, whole: states.Snapshot, state: Path, tmp_path: Path
) -> None:
    state.unlink()
    state.mkdir()
    (state / "notes").write_text("theirs")
    with pytest.warns(RuntimeWarning, match=DAMAGED):
        assert pool(model, tmp_path).find(TOKENS) is None
    assert equal(prefill(model, TOKENS, segment=64, pool=pool(model, tmp_path)), whole)
    assert equal(pool(model, tmp_path).find(TOKENS), whole)
    (notes,) = state.parent.glob("*/notes")
    assert notes.read_text() == "theirs"


@pytest.mark.parametrize("plant", [fifo, device, nested, sparse, zeros])
def test_a_resumed_file_that_is_no_state_is_refused_or_read_again(
    model: Any, whole: states.Snapshot, state: Path, tmp_path: Path, plant: Callable[[Path, bytes], None]
) -> None:
    file = tmp_path / "resumed"
    plant(file, state.read_bytes())
    if plant is sparse:  # it begins as a state does
        with pytest.warns(RuntimeWarning, match=FROM_FIRST):
            assert equal(prefill(model, TOKENS, segment=64, file=file), whole)
        return
    with pytest.raises(states.StateMismatch, match=r"file must be a state that was saved, got .*, which is "):
        prefill(model, TOKENS, segment=64, file=file)
    assert os.path.lexists(file)


# States with a right checksum and wrong content


def metadata(**changes: str) -> Callable[[EncodedSnapshot], EncodedSnapshot]:
    return lambda encoded: encoded._replace(about={**encoded.about, **changes})


def without(key: str) -> Callable[[EncodedSnapshot], EncodedSnapshot]:
    return lambda encoded: EncodedSnapshot(
        {name: value for name, value in encoded.about.items() if name != key},
        {name: tensor for name, tensor in encoded.tensors.items() if not name.startswith(key)})


def tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[EncodedSnapshot], EncodedSnapshot]:
    return lambda encoded: encoded._replace(
        tensors={**encoded.tensors, name: change(encoded.tensors.get(name, torch.zeros(1))).contiguous()})


WRONG = {
    "unknown dtype": metadata(dtype="float128"),
    "other dtype": metadata(dtype="bfloat16"),
    "unknown storage": metadata(storage="int4"),
    "other storage": metadata(storage="int8"),
    "negative position": metadata(position="-40"),
    "position of text": metadata(position="many"),
    "position of 5000 digits": metadata(position="4" * 5000),
    "negative segment": metadata(segment="-1"),
    "error that is no number": metadata(error="nan"),
    "no position": without("position"),
    "no digest": without("digest"),
    "no dtype": without("dtype"),
    "no logits": without("logits"),
    "no first layer": without("0."),
    "no last layer": without("1."),
    "no n": without("1.n"),
    "no tensors": lambda encoded: encoded._replace(tensors={}),
    "one layer more": tensor("2.m", lambda t: t),
    "unknown tensor": tensor("extra", lambda t: t),
    "wider c": tensor("0.c", lambda t: torch.cat([t, t], -1)),
    "c that would broadcast": tensor("0.c", lambda t: t[..., :1]),
    "n without a dimension": tensor("1.n", lambda t: t[0]),
    "two rows": tensor("0.m", lambda t: torch.cat([t, t])),
    "float64 m": tensor("0.m", lambda t: t.double()),
    "integer c": tensor("0.c", lambda t: t.int()),
    "logits of another vocabulary": tensor("logits", lambda t: t[:-1]),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_state_with_wrong_content_is_damaged(
    model: Any, whole: states.Snapshot, state: Path, tmp_path: Path, what: str
) -> None:
    content = state_file.to_bytes(WRONG[what](codec.encode(whole)))
    state.write_bytes(content)
    with pytest.warns(RuntimeWarning, match=DAMAGED):
        assert pool(model, tmp_path).find(TOKENS) is None
    assert not state.exists()
    (tmp_path / "resumed").write_bytes(content)
    with pytest.warns(RuntimeWarning, match=FROM_FIRST):
        assert equal(prefill(model, TOKENS, segment=64, file=tmp_path / "resumed"), whole)


# Links


def test_prune_and_find_do_not_follow_a_linked_folder(
    model: Any, whole: states.Snapshot, state: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    state.parent.rename(outside)
    (tmp_path / "outside" / ".old.partial").touch()
    state.parent.symlink_to(outside)
    assert DiskTier(tmp_path / "pool").prune(0) == []
    assert pool(model, tmp_path).find(TOKENS) is None
    with pytest.warns(RuntimeWarning, match="could not save a state to .* is a link"):
        pool(model, tmp_path).put(TOKENS, whole)
    assert sorted(path.name for path in outside.iterdir()) == [".old.partial", state.name]


def test_a_linked_pin_creates_no_file_outside(model: Any, state: Path, tmp_path: Path) -> None:
    state.with_suffix(".pin").symlink_to(tmp_path / "outside")
    with pytest.raises(OSError, match=r"\.pin"):
        pool(model, tmp_path).pin(TOKENS)
    assert not (tmp_path / "outside").exists()


def test_partial_files_that_others_left_stop_nothing(
    model: Any, whole: states.Snapshot, state: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    kept.write_text("theirs")
    state.unlink()
    (state.parent / f".{state.name}.partial").mkdir()
    (state.parent / f".{state.name}.1.partial").symlink_to(kept)
    pool(model, tmp_path).put(TOKENS, whole)
    assert equal(pool(model, tmp_path).find(TOKENS), whole)
    assert kept.read_text() == "theirs"
