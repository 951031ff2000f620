"""Streams of tokens: read in pieces, checked, hashed, and put back when a piece could not be processed."""

from __future__ import annotations

import hashlib
import itertools
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence, Sized
from pathlib import Path
from typing import Any

from torch import Tensor

TEXT_BLOCK = 1 << 20  # characters of a text that are tokenized at once


class TokenDigest:
    """The hash of a growing sequence of tokens; each token is hashed once."""

    def __init__(self, before: str = "") -> None:
        """before: the digest of earlier tokens that are gone; the result then depends on where they ended."""
        self._hash = hashlib.blake2b(before.encode(), digest_size=16)

    def add(self, tokens: array[int]) -> None:
        """Append tokens."""
        if sys.byteorder == "big":
            tokens = array("i", tokens)
            tokens.byteswap()
        self._hash.update(tokens)

    def hex(self) -> str:
        """Return the digest of all tokens so far."""
        return self._hash.hexdigest()


def digest(tokens: array[int]) -> str:
    """Return the digest of tokens."""
    found = TokenDigest()
    found.add(tokens)
    return found.hex()


def as_array(tokens: Iterable[int]) -> array[int]:
    """Return tokens as an array of 32-bit integers; such an array is returned itself."""
    if isinstance(tokens, array) and tokens.typecode == "i":
        return tokens
    return array("i", tokens.tolist() if isinstance(tokens, Tensor) else tokens)


class TokenStreamFailed(Exception):
    """The caller's stream of tokens raised `__cause__`."""


class TokenSource:
    """A stream of tokens that is taken in pieces; a piece can be put back.

    vocabulary: other tokens than 0 to vocabulary - 1 raise ValueError when they are reached. An error of the stream
        raises TokenStreamFailed; the tokens before it stay in `waiting`.
    """

    def __init__(self, tokens: Iterable[int], vocabulary: int, position: int = 0) -> None:
        self.left = len(tokens) if isinstance(tokens, Sized) else None  # tokens to come; None if unknown
        self.waiting: array[int] = array("i")  # read from the stream and not taken yet
        self._stream = iter(tokens.tolist() if isinstance(tokens, Tensor) else tokens)
        self.given = position  # tokens that the stream gave, and those before it
        self._vocabulary = vocabulary

    def take(self, count: int) -> array[int]:
        """Return the next `count` tokens, fewer at the end."""
        self.peek(count)
        piece, self.waiting = self.waiting[:count], self.waiting[count:]
        if self.left is not None:
            self.left -= len(piece)
        return piece

    def peek(self, count: int) -> array[int]:
        """Return up to `count` next tokens without taking them."""
        try:
            for token in itertools.islice(self._stream, max(0, count - len(self.waiting))):
                if not 0 <= token < self._vocabulary:
                    break
                self.waiting.append(token)
                self.given += 1
            else:
                return self.waiting[:count]
        except Exception as error:  # whatever the caller's iterable raises
            raise TokenStreamFailed from error
        raise ValueError(f"tokens must be from 0 up and below the model's {self._vocabulary}, got {token} at position "
                         f"{self.given}")

    def put_back(self, piece: array[int]) -> None:
        """Make a piece the next tokens again."""
        self.waiting = piece + self.waiting
        if self.left is not None:
            self.left += len(piece)


def text_tokens(path: str | Path, tokenizer: Any, block: int = TEXT_BLOCK) -> Iterator[int]:
    """Yield the tokens of a UTF-8 text file of any length, in constant memory.

    A text longer than `block` characters is tokenized in blocks that end at a line end, or after `block` characters
    without one. A tokenizer that joins characters across line ends may give other tokens there than for the whole
    text. Special tokens are added at the beginning of the first block only.
    """
    with open(path, encoding="utf-8") as file:
        rest, first = "", True
        while text := file.read(block):
            rest += text
            cut = len(rest) if len(text) < block else rest.rfind("\n") + 1 or len(rest)
            yield from _tokens(tokenizer, rest[:cut], first)
            rest, first = rest[cut:], False
        if rest:
            yield from _tokens(tokenizer, rest, first)


def _tokens(tokenizer: Any, text: str, first: bool) -> Sequence[int]:
    return tokenizer(text, add_special_tokens=first)["input_ids"]  # type: ignore[no-any-return]
