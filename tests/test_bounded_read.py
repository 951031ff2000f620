"""Laws of reading files that others may have changed: nothing blocks, exhausts memory or overflows the stack."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from torch_xlstm_ops.runtime.bounded_read import MAX_DEPTH, parse_json, read_beginning, read_bytes


def test_a_regular_file_is_read_up_to_its_bound(tmp_path: Path) -> None:
    file = tmp_path / "file"
    for content in (b"", b"12345"):
        file.write_bytes(content)
        assert read_bytes(file, 5) == content
        assert read_beginning(file, 3) == content[:3]
    with pytest.raises(ValueError, match="5 bytes, more than 4"):
        read_bytes(file, 4)
    with pytest.raises(FileNotFoundError):
        read_bytes(tmp_path / "none", 4)


def test_a_sparse_file_is_refused_by_its_size(tmp_path: Path) -> None:
    file = tmp_path / "sparse"
    file.touch()
    os.truncate(file, 1 << 40)
    with pytest.raises(ValueError, match=f"{1 << 40} bytes, more than 1000"):
        read_bytes(file, 1000)
    assert read_beginning(file, 8) == bytes(8)


@pytest.mark.skipif(os.name != "posix", reason="FIFOs and devices need POSIX")
def test_other_kinds_of_files_are_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, Path("/dev/zero")):
        for read in (read_bytes, read_beginning):
            with pytest.raises(ValueError, match="not a regular file"):
                read(path, 1 << 20)


def test_links_are_followed_only_if_asked_for(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert read_bytes(tmp_path / "link", 10) == b"content"
    for read in (read_bytes, read_beginning):
        with pytest.raises(ValueError, match="a link"):
            read(tmp_path / "link", 10, follow_links=False)


def test_json_is_parsed_up_to_a_depth() -> None:
    assert parse_json(b'{"a": "[[[[", "b": ["\\"[", 1]}', max_depth=2) == {"a": "[[[[", "b": ['"[', 1]}
    deepest = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert str(parse_json(deepest.encode())) == deepest
    for content in (f"[{deepest}]".encode(), b"[" * 100_000, b'{"a":' * 100_000):
        with pytest.raises(ValueError, match=f"JSON nested deeper than {MAX_DEPTH} levels"):
            parse_json(content)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[1,]", b"9" * 5000, b'"\\'])
def test_bad_json_is_a_value_error(content: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  (each reason has its own text)
        parse_json(content)
