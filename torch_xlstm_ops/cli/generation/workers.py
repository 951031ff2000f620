"""Read a prompt with several Ray actors, for `generate --prefill-workers`."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from torch import Tensor

from torch_xlstm_ops.cli.generation.prompt import Prompt
from torch_xlstm_ops.cli.shared.errors import BadInput, bad_input
from torch_xlstm_ops.cli.shared.loading import Loaded
from torch_xlstm_ops.parallel import Report, Workers

WARM_UP_TOKENS = 2048  # most tokens per worker in the warm-up, which compiles


class PrefillWorkers:
    """Workers that hold a model, for a ``with`` block; a call reads a prompt.

    count: of workers; gpus: part of a GPU for each, default 1.

    Raises BadInput if Ray or the model cannot do that.
    """

    def __init__(self, loaded: Loaded, prompt: Prompt, count: int, gpus: float | None = None) -> None:
        if len(prompt) < 2:
            raise BadInput(f"--prefill-workers must have a prompt of at least 2 tokens, got {len(prompt)}")
        with bad_input():
            self._workers = Workers(loaded.model, count, gpus=gpus)
        self._count = count
        self.report: Report | None = None

    def warm_up(self, prompt: Prompt) -> None:
        """Make every worker compile what the prompt needs."""
        self._workers.prefill(list(prompt)[: WARM_UP_TOKENS * self._count])

    def __call__(self, prompt: Prompt) -> tuple[Tensor, Any]:
        """Return the last logits (V,) of a prompt, and the cache after it."""
        found = self._workers.prefill(list(prompt))
        self.report = found.report
        return found.logits[0], found.cache

    def __enter__(self) -> PrefillWorkers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._workers.close()
