"""From logits to tokens, and from tokens to text that can be shown while it grows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

# A decoded token that is no whole character ends in this; after so many tokens it is shown as it is.
_BROKEN = "\ufffd"
_PATIENCE = 8
CONTEXT = 8  # prompt tokens that decide how the first new one is spelled


class Tokenizer(Protocol):
    """What we ask of a tokenizer."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Return the text of the tokens."""


def chooser(
    *, temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None, seed: int = 0
) -> Callable[[Tensor], int]:
    """Return a function from logits (V,) to the next token.

    temperature: 0 takes the most likely token, and the rest is unused; default 0.
    top_k: most candidates; top_p: probability that the candidates reach together; default all.
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
    """Return probabilities (V,) of the tokens that top-k, then top-p, leave; at least one is left."""
    if top_k is not None and top_k < logits.numel():
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    probabilities = logits.softmax(-1)
    if top_p is None:
        return probabilities
    ordered, order = probabilities.sort(descending=True)
    before = ordered.cumsum(-1) - ordered  # probability of all the likelier ones
    kept = ordered.masked_fill(before >= top_p, 0.0)
    return torch.zeros_like(probabilities).scatter(0, order, kept / kept.sum())


class TextStream:
    """Turn tokens into text as they come, whole characters at a time, and end it before a stop string."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(prompt[-CONTEXT:])
        self._start = 0  # tokens from here give the text around the new ones
        self._shown = len(self._tokens)
        self._stops = tuple(stops)
        self._held = ""  # decoded, but maybe the beginning of a stop string
        self.stopped = False

    def push(self, token: int) -> str:
        """Take a token and return the text that is certain now; `stopped` says whether a stop string was met."""
        self._tokens.append(token)
        before = self._decode(self._tokens[self._start : self._shown])
        after = self._decode(self._tokens[self._start :])
        if after.endswith(_BROKEN) and len(self._tokens) - self._shown < _PATIENCE:
            return ""
        self._start, self._shown = self._shown, len(self._tokens)
        return self._release(after[len(before) :])

    def flush(self) -> str:
        """Return the text still held back, once no token follows."""
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
    """Return the length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
