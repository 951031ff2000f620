"""The tokens of a prompt: a list, or a file that is read again whenever it is iterated over."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch_xlstm_ops.cli.generation.sampling import CONTEXT_TOKENS
from torch_xlstm_ops.cli.shared.errors import BadInput
from torch_xlstm_ops.cli.shared.loading import Loaded
from torch_xlstm_ops.context import text_tokens
from torch_xlstm_ops.models import transformers as adapter


def encode(loaded: Loaded, prompt: str) -> list[int]:
    """Return a prompt's tokens. Raises BadInput if there is none, or one that the model has no embedding for."""
    tokens = list(loaded.tokenizer(prompt)["input_ids"])
    if not tokens:
        raise BadInput(f"the prompt must hold at least one token, got {prompt!r}")
    known = adapter.vocabulary_size(loaded.model)
    if max(tokens) >= known:
        raise BadInput(f"the tokenizer must give tokens below the model's {known}, got {max(tokens)}")
    return tokens


class LongPrompt:
    """The tokens of a file of any length, which is read and tokenized at each iteration.

    Raises BadInput like `encode`.
    """

    def __init__(self, loaded: Loaded, path: Path) -> None:
        self._path, self._tokenizer = path, loaded.tokenizer
        known = adapter.vocabulary_size(loaded.model)
        last: deque[int] = deque(maxlen=CONTEXT_TOKENS)
        self._count = 0
        for token in self:
            if token >= known:
                raise BadInput(f"the tokenizer must give tokens below the model's {known}, got {token}")
            last.append(token)
            self._count += 1
        self.last = list(last)
        if not last:
            raise BadInput(f"the prompt must hold at least one token, got {path}")

    def __iter__(self) -> Iterator[int]:
        return text_tokens(self._path, self._tokenizer)

    def __len__(self) -> int:
        return self._count


Prompt = Sequence[int] | LongPrompt


def prompt_of(loaded: Loaded, prompt: str | Path) -> Prompt:
    """Return the tokens of a text, or of a file that is too long to be held in memory."""
    return LongPrompt(loaded, prompt) if isinstance(prompt, Path) else encode(loaded, prompt)
