"""A conversation that reads every token once: an example of how to use a pool, small enough to copy."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

from torch import Tensor

from torch_xlstm_ops.context.pool.pool import StatePool


def most_likely(logits: Tensor) -> int:
    """Return the most likely token."""
    return int(logits.argmax())


class ChatSession:
    """Turns of a user and a model, each read from the longest prefix that the pool holds.

    pool: also receives the state after every turn; with a folder, another process can continue the conversation.
    tokenizer: of transformers.
    tokens: the conversation so far; default empty.
    choose: from logits (V,) to the next token; default the most likely one.
    ends: tokens that end a reply and are not part of it; default the tokenizer's end of text.
    """

    def __init__(
        self, pool: StatePool, tokenizer: Any, *, tokens: Iterable[int] = (),
        choose: Callable[[Tensor], int] = most_likely, ends: Collection[int] | None = None,
    ) -> None:
        self.tokens = list(tokens)
        self._pool, self._tokenizer, self._choose = pool, tokenizer, choose
        self._ends = {tokenizer.eos_token_id} if ends is None else set(ends)
        self._turns: list[int] = []  # index of each turn's first token

    def say(self, text: str, max_new_tokens: int = 200) -> str:
        """Read the user's turn and return the model's reply, of at most `max_new_tokens` tokens.

        Raises ValueError for an empty conversation and a `text` without tokens.
        """
        added = self._tokenizer(text, add_special_tokens=not self.tokens)["input_ids"]
        start = len(self.tokens)
        batch = self._pool.batch([[*self.tokens, *added]])
        reply: list[int] = []
        while len(reply) < max_new_tokens and (token := self._choose(batch.logits[0])) not in self._ends:
            batch.read([[token]])
            reply.append(token)
        batch.put(self._pool)
        self._turns.append(start)
        self.tokens = batch.tokens[0].tolist()
        return str(self._tokenizer.decode(reply, skip_special_tokens=True))

    def undo(self) -> None:
        """Remove the last turn and its reply. Raises IndexError if there is none."""
        del self.tokens[self._turns.pop() :]

    def branch(self) -> ChatSession:
        """Return a copy of the conversation, which continues on its own."""
        other = ChatSession(self._pool, self._tokenizer, tokens=self.tokens, choose=self._choose, ends=self._ends)
        other._turns = self._turns[:]
        return other
