"""Choose tokens from logits, and turn tokens into text while they are generated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

_BROKEN = "\ufffd"  # the end of decoded tokens that are no whole character
_MAX_BROKEN_TOKENS = 8  # held back for the rest of a character
CONTEXT_TOKENS = 8  # of the prompt: a token may decode differently after others


class Tokenizer(Protocol):
    """A tokenizer, as far as it is used here."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Return the text of the tokens."""


def chooser(
    *, temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None, seed: int = 0
) -> Callable[[Tensor], int]:
    """Return a function from logits (V,) to the next token.

    temperature: default 0, which takes the most likely token and ignores the rest.
    top_k: most candidates; top_p: total probability of the candidates; default all tokens.
    seed: the same seed and logits give the same tokens on every device.
    """
    if temperature == 0:
        return lambda logits: int(logits.argmax())
    generator = torch.Generator().manual_seed(seed)

    def choose(logits: Tensor) -> int:
        weights = candidates(logits.float().cpu() / temperature, top_k, top_p)
        return int(torch.multinomial(weights, 1, generator=generator))

    return choose


def candidates(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Return probabilities (V,) after top-k, then top-p; at least one is above 0."""
    if top_k is not None and top_k < logits.numel():
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    probabilities = logits.softmax(-1)
    if top_p is None:
        return probabilities
    ordered, order = probabilities.sort(descending=True)
    before = ordered.cumsum(-1) - ordered  # probability of all more likely ones
    kept = ordered.masked_fill(before >= top_p, 0.0)
    return torch.zeros_like(probabilities).scatter(0, order, kept / kept.sum())


class TextStream:
    """Decode tokens one by one into whole characters, and end the text before a stop string."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(prompt[-CONTEXT_TOKENS:])
        self._start = 0  # tokens before this do not affect how later ones decode
        self._shown = len(self._tokens)
        self._stops = tuple(stops)
        self._held = ""  # decoded text that may begin a stop string
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token and return the text that is final; `stopped` is True after a stop string."""
        self._tokens.append(token)
        before = self._decode(self._tokens[self._start : self._shown])
        after = self._decode(self._tokens[self._start :])
        if after.endswith(_BROKEN) and len(self._tokens) - self._shown < _MAX_BROKEN_TOKENS:
            return ""
        self._start, self._shown = self._shown, len(self._tokens)
        return self._release(after[len(before) :])

    def flush(self) -> str:
        """Return the text that is held back, after the last token."""
        if self.stopped:
            return ""
        before = self._decode(self._tokens[self._start : self._shown])
        rest = self._decode(self._tokens[self._start :])[len(before) :]
        self._shown = self._start = len(self._tokens)
        return self._release(rest) + ("" if self.stopped else self._take(0))

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def _release(self, text: str) -> str:
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped = True
            return self._held[: min(found)]
        return self._take(max((_overlap(self._held, stop) for stop in self._stops), default=0))

    def _take(self, kept: int) -> str:
        cut = len(self._held) - kept
        text, self._held = self._held[:cut], self._held[cut:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of `text` that is a prefix of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
