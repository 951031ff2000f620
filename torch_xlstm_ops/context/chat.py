"""A conversation whose past is never read twice: an example of a pool's use, and small enough to copy."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

from torch import Tensor

from torch_xlstm_ops.context.pool.pool import StatePool


def likeliest(logits: Tensor) -> int:
    """Return the most likely token."""
    return int(logits.argmax())


class ChatSession:
    """Turns of a user and a model, each read from where the pool knows the conversation.

    pool: also where every turn's state is kept: with a folder, the conversation goes on in another process.
    tokenizer: of transformers.
    tokens: what was said before; default nothing.
    choose: from logits (V,) to the next token; default the most likely one.
    ends: tokens that end a reply and are not part of it; default the tokenizer's end of text.
    """

    def __init__(
        self, pool: StatePool, tokenizer: Any, *, tokens: Iterable[int] = (),
        choose: Callable[[Tensor], int] = likeliest, ends: Collection[int] | None = None,
    ) -> None:
        self.tokens = list(tokens)
        self._pool, self._tokenizer, self._choose = pool, tokenizer, choose
        self._ends = {tokenizer.eos_token_id} if ends is None else set(ends)
        self._turns: list[int] = []  # where each began

    def say(self, text: str, max_new_tokens: int = 200) -> str:
        """Read a turn of the user's and return the model's reply, of at most so many tokens.

        Raises ValueError when nothing was said yet and `text` has no tokens.
        """
        spoken = self._tokenizer(text, add_special_tokens=not self.tokens)["input_ids"]
        began = len(self.tokens)
        batch = self._pool.batch([[*self.tokens, *spoken]])
        reply: list[int] = []
        while len(reply) < max_new_tokens and (token := self._choose(batch.logits[0])) not in self._ends:
            batch.read([[token]])
            reply.append(token)
        batch.put(self._pool)
        self._turns.append(began)
        self.tokens = batch.tokens[0].tolist()
        return str(self._tokenizer.decode(reply, skip_special_tokens=True))

    def undo(self) -> None:
        """Take back the last turn and its reply; the pool still knows what was before. Raises IndexError at the start.
        """
        del self.tokens[self._turns.pop() :]

    def branch(self) -> ChatSession:
        """Return another conversation with the same past."""
        other = ChatSession(self._pool, self._tokenizer, tokens=self.tokens, choose=self._choose, ends=self._ends)
        other._turns = self._turns[:]
        return other
