"""Laws of state files that others may have changed: whatever is wrong is "damaged", and links lead nowhere else."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from tests.context_models import SEGMENT, build, equal, some_tokens
from torch_xlstm_ops.context import StatePool, codec, prefill, state_file, states
from torch_xlstm_ops.context.codec import EncodedSnapshot
from torch_xlstm_ops.context.pool.disk import DiskTier
from torch_xlstm_ops.models.identity import identity
from torch_xlstm_ops.runtime import bounded_read

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.skipif(os.name != "posix", reason="needs POSIX files")]
TOKENS = some_tokens(64)


@pytest.fixture(scope="module")
def model() -> Any:
    return build()


@pytest.fixture(scope="module")
def whole(model: Any) -> states.Snapshot:
    return prefill(model, TOKENS, segment=SEGMENT)


def state_of(folder: Path, position: int = 64) -> Path:
    """Return the file of the state after so many tokens."""
    (path,) = folder.rglob(f"{position:012d}-*.safetensors")
    return path


def sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(1 << 43)


def nested(path: Path) -> None:
    header = b'{"__metadata__": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    path.write_bytes(struct.pack("<Q", len(header)) + header)


CONTENT: dict[str, Callable[[Path], object]] = {
    "FIFO": os.mkfifo, "sparse": sparse, "nested": nested, "folder": Path.mkdir,
    "device": lambda path: path.symlink_to("/dev/zero"), "huge header": lambda path: path.write_bytes(b"\xff" * 64),
    "number": lambda path: path.write_bytes(struct.pack("<Q", 5000) + b"9" * 5000),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", CONTENT)
def test_what_is_no_state_is_damaged_and_read_again(
    model: Any, whole: states.Snapshot, tmp_path: Path, kind: str
) -> None:
    prefill(model, TOKENS, segment=SEGMENT, pool=StatePool(model, tmp_path))
    path = state_of(tmp_path)
    path.unlink()
    CONTENT[kind](path)
    assert [wrong is None for _, wrong in DiskTier(tmp_path).verify()].count(False) == 1
    with pytest.warns(RuntimeWarning, match="removed a damaged state, its tokens are read again"):
        found = prefill(model, TOKENS, segment=SEGMENT, pool=StatePool(model, tmp_path))
    assert equal(found, whole)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["FIFO", "sparse", "nested"])
def test_what_is_no_state_is_not_resumed_nor_written_over(model: Any, tmp_path: Path, kind: str) -> None:
    CONTENT[kind](tmp_path / "state")
    with pytest.raises(ValueError, match=r"file must be a state that was saved, got .*state, which is something else"):
        prefill(model, TOKENS, file=tmp_path / "state")


def changed(encoded: EncodedSnapshot, **about: str) -> EncodedSnapshot:
    return encoded._replace(about={**encoded.about, **about})


def with_tensor(encoded: EncodedSnapshot, name: str, tensor: torch.Tensor | None) -> EncodedSnapshot:
    tensors = {**encoded.tensors, name: tensor}
    return encoded._replace(tensors={name: tensor for name, tensor in tensors.items() if tensor is not None})


WRONG: dict[str, Callable[[EncodedSnapshot], EncodedSnapshot]] = {
    "dtype": lambda e: changed(e, dtype="int99"), "another dtype": lambda e: changed(e, dtype="float16"),
    "storage": lambda e: changed(e, storage="int4"), "codec": lambda e: changed(e, storage="int8"),
    "position": lambda e: changed(e, position="-1"), "no number": lambda e: changed(e, position="many"),
    "error": lambda e: changed(e, error="nan"),
    "no logits": lambda e: with_tensor(e, "logits", None), "no c": lambda e: with_tensor(e, "0.c", None),
    "no layer": lambda e: e._replace(tensors={n: t for n, t in e.tensors.items() if not n.startswith("1.")}),
    "extra": lambda e: with_tensor(e, "more", torch.zeros(1)),
    "broadcast": lambda e: with_tensor(e, "0.c", e.tensors["0.c"][:, :1].clone()),
    "logits": lambda e: with_tensor(e, "logits", torch.zeros(63)),
    "number type": lambda e: with_tensor(e, "1.n", e.tensors["1.n"].double()),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_layout_with_a_right_checksum_is_damaged(
    model: Any, whole: states.Snapshot, tmp_path: Path, kind: str
) -> None:
    prefill(model, TOKENS, segment=SEGMENT, pool=StatePool(model, tmp_path / "pool"))
    content = state_file.to_bytes(WRONG[kind](codec.encode(whole)))
    state_of(tmp_path / "pool").write_bytes(content)
    (tmp_path / "file").write_bytes(content)
    with pytest.warns(RuntimeWarning, match="removed a damaged state, its tokens are read again"):
        assert equal(prefill(model, TOKENS, segment=SEGMENT, pool=StatePool(model, tmp_path / "pool")), whole)
    with pytest.warns(RuntimeWarning, match="the prompt is read from its first token"):
        assert equal(prefill(model, TOKENS, segment=SEGMENT, file=tmp_path / "file"), whole)


def test_links_are_never_followed_out_of_the_pools_folder(model: Any, tmp_path: Path) -> None:
    outside, pool = tmp_path / "outside", tmp_path / "pool"
    prefill(model, TOKENS, segment=SEGMENT, pool=StatePool(model, outside))
    (outside / identity(model) / ".x.partial").write_text("mine")
    pool.mkdir()
    (pool / identity(model)).symlink_to(outside / identity(model))
    before = sorted(path.name for path in outside.rglob("*"))
    assert DiskTier(pool).entries() == DiskTier(pool).prune(0) == []
    with pytest.warns(RuntimeWarning, match="could not save a state to .* is a link"):
        prefill(model, TOKENS, segment=SEGMENT, pool=StatePool(model, pool))
    assert sorted(path.name for path in outside.rglob("*")) == before


def test_a_state_that_is_a_link_is_replaced_and_its_target_kept(model: Any, tmp_path: Path) -> None:
    pool, target = tmp_path / "pool", tmp_path / "target"
    prefill(model, TOKENS, segment=SEGMENT, pool=StatePool(model, pool))
    path = state_of(pool)
    path.rename(target)
    path.symlink_to(target)
    content = target.read_bytes()
    with pytest.warns(RuntimeWarning, match="removed a damaged state"):
        prefill(model, TOKENS, segment=SEGMENT, pool=StatePool(model, pool))
    assert target.read_bytes() == content
    assert not path.is_symlink()
    assert path.is_file()


def test_the_users_own_link_of_a_checkpoint_is_written_through(model: Any, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "state")
    prefill(model, TOKENS, segment=SEGMENT, file=tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert state_file.read(tmp_path / "state").about["position"] == "64"


def test_a_folder_named_like_a_partial_file_stops_nothing(model: Any, tmp_path: Path) -> None:
    (tmp_path / identity(model) / ".state.partial").mkdir(parents=True)
    pool = StatePool(model, tmp_path, host_bytes=0, device_bytes=0)
    prefill(model, TOKENS, segment=SEGMENT, pool=pool)
    assert pool.stats().disk.states == 2


def test_json_of_bounded_depth_is_what_json_reads() -> None:
    value = {"a[": ["\\\"]", {"b": [1, 2.5, None, True]}], "]}": "é"}
    assert bounded_read.parse_json(json.dumps(value).encode()) == value
    assert bounded_read.parse_json(b"[" * 32 + b"]" * 32)
    with pytest.raises(ValueError, match="JSON nested deeper than 32 levels"):
        bounded_read.parse_json(b"[" * 33 + b"]" * 33)
