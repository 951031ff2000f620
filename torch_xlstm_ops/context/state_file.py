"""One snapshot in one file of safetensors with a checksum: written atomically, and checked when it is read."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from torch_xlstm_ops.context import codec
from torch_xlstm_ops.context.codec import FORMAT, EncodedSnapshot, Storage
from torch_xlstm_ops.context.states import Snapshot
from torch_xlstm_ops.models.identity import raw_bytes
from torch_xlstm_ops.runtime import bounded_read, files

SUFFIX = ".safetensors"
MAX_BYTES = 1 << 36  # of a file that is read for any model; a state of a 7B model has about 2**27
MAX_HEADER_BYTES = 1 << 24


class DamagedFile(ValueError):
    """A file does not hold the snapshot that was written to it."""


def to_bytes(encoded: EncodedSnapshot) -> bytes:
    """Return the bytes of a file of safetensors, with a checksum over everything in it."""
    from safetensors.torch import save

    return save(dict(encoded.tensors), {**encoded.about, "checksum": _checksum(encoded)})


def write(path: Path, content: bytes) -> None:
    """Replace a file by the bytes of a state, atomically and durably. Raises OSError."""
    with files.replacing(path, "wb", durable=True) as file:
        file.write(content)


def max_bytes(outline: Snapshot) -> int:
    """Return the most bytes that a file with a state of a model has, in any storage."""
    return MAX_HEADER_BYTES + max(codec.encoded_bytes(outline, storage) for storage in Storage)


def read(path: Path, most: int = MAX_BYTES, *, follow_links: bool = True) -> EncodedSnapshot:
    """Return the snapshot in a file of at most `most` bytes.

    Raises DamagedFile for anything but a snapshot as it was written, OSError for a file that cannot be opened.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        _header_bytes(bounded_read.read_beginning(path, 8, follow_links=follow_links))  # before the rest is read
        content = bounded_read.read_bytes(path, most, follow_links=follow_links)
        about = _metadata(content)
        checksum = about.pop("checksum")
        encoded = EncodedSnapshot(about, load(content))
        intact = about["format"] == FORMAT and checksum == _checksum(encoded)
    except (struct.error, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        raise DamagedFile(f"{path} does not hold a complete state: {error}") from None
    if not intact:
        raise DamagedFile(f"{path} was changed after it was written: its checksum differs")
    if (wrong := codec.mismatch(encoded)) is not None:
        raise DamagedFile(f"{path} does not hold a complete state: {wrong}")
    return encoded


def _header_bytes(content: bytes) -> int:
    length: int = struct.unpack_from("<Q", content)[0]
    if not 0 < length <= MAX_HEADER_BYTES:
        raise ValueError(f"a header of {length} bytes")
    return length


def _metadata(content: bytes) -> dict[str, str]:
    about: dict[str, Any] = bounded_read.parse_json(content[8 : 8 + _header_bytes(content)])["__metadata__"]
    if not all(type(value) is str for value in about.values()):
        raise TypeError("metadata that is no text")
    return about


def is_state(path: Path) -> bool:
    """Return whether a file is empty, or begins as a state does, complete or not."""
    beginning = bounded_read.read_beginning(path, 1 << 16)
    return not beginning or FORMAT.encode() in beginning


def _checksum(encoded: EncodedSnapshot) -> str:
    found = hashlib.blake2b(digest_size=16)
    found.update(json.dumps(encoded.about, sort_keys=True).encode())
    for name in sorted(encoded.tensors):
        tensor = encoded.tensors[name]
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(raw_bytes(tensor))
    return found.hexdigest()
