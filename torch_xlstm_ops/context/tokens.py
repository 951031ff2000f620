"""Tokens from wherever they come, in pieces: counted, checked, digested, and put back when they could not be read."""

from __future__ import annotations

import hashlib
import itertools
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence, Sized
from pathlib import Path
from typing import Any

from torch import Tensor

BLOCK = 1 << 20  # characters of a text that are turned into tokens at once


class Digest:
    """The hash of a growing sequence of tokens."""

    def __init__(self, before: str = "") -> None:
        """before: the digest of tokens that came before and are gone; the result is then of this cut alone."""
        self._hash = hashlib.blake2b(before.encode(), digest_size=16)

    def add(self, tokens: array[int]) -> None:
        """Take more tokens."""
        if sys.byteorder == "big":
            tokens = array("i", tokens)
            tokens.byteswap()
        self._hash.update(tokens)

    def hex(self) -> str:
        """Return the digest of all tokens so far."""
        return self._hash.hexdigest()


def digest(tokens: array[int]) -> str:
    """Return the digest of tokens."""
    found = Digest()
    found.add(tokens)
    return found.hex()


def as_array(tokens: Iterable[int]) -> array[int]:
    """Return tokens as an array of 32-bit integers."""
    if isinstance(tokens, array) and tokens.typecode == "i":
        return tokens
    return array("i", tokens.tolist() if isinstance(tokens, Tensor) else tokens)


class Broken(Exception):
    """A stream raised; `__cause__` says what."""


class Source:
    """Tokens that are taken in pieces. What was taken and could not be read is put back, and comes again.

    known: tokens that the model knows; others raise ValueError where they stand. What the stream raises comes as
        Broken, with the tokens before it waiting.
    """

    def __init__(self, tokens: Iterable[int], known: int, position: int = 0) -> None:
        self.left = len(tokens) if isinstance(tokens, Sized) else None  # tokens to come; None where nobody knows
        self.waiting: array[int] = array("i")  # taken from the stream, not yet from here
        self._stream = iter(tokens.tolist() if isinstance(tokens, Tensor) else tokens)
        self.given = position  # tokens that the stream gave, and those before it
        self._known = known

    def take(self, count: int) -> array[int]:
        """Return the next `count` tokens, fewer at the end."""
        self.look(count)
        piece, self.waiting = self.waiting[:count], self.waiting[count:]
        if self.left is not None:
            self.left -= len(piece)
        return piece

    def look(self, count: int) -> array[int]:
        """Return up to `count` tokens that come next, without taking them."""
        try:
            for token in itertools.islice(self._stream, max(0, count - len(self.waiting))):
                if not 0 <= token < self._known:
                    break
                self.waiting.append(token)
                self.given += 1
            else:
                return self.waiting[:count]
        except Exception as error:
            raise Broken from error
        raise ValueError(f"tokens must be from 0 up and below the model's {self._known}, got {token} at position "
                         f"{self.given}")

    def put_back(self, piece: array[int]) -> None:
        """Let a piece come again."""
        self.waiting = piece + self.waiting
        if self.left is not None:
            self.left += len(piece)


def text_tokens(path: str | Path, tokenizer: Any, block: int = BLOCK) -> Iterator[int]:
    """Yield the tokens of a UTF-8 text file of any length, in constant memory.

    A text longer than `block` characters is turned into tokens in blocks that end with a line (or with the block,
    where no line ends in it): for a tokenizer that joins characters over line ends, tokens may differ there from the
    whole text's. Marks that a tokenizer puts around a text stand at the first block's beginning alone.
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
