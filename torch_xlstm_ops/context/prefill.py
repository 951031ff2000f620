"""Read a prompt of any length in constant memory, piece by piece, with a place to resume after every piece."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from torch_xlstm_ops.context import states
from torch_xlstm_ops.context.checkpoint import Checkpoint
from torch_xlstm_ops.context.piece_size import PieceSize
from torch_xlstm_ops.context.reader import PromptReader, SnapshotStore
from torch_xlstm_ops.context.states import Snapshot
from torch_xlstm_ops.context.tokens import TokenSource, TokenStreamFailed
from torch_xlstm_ops.models import transformers as adapter
from torch_xlstm_ops.models.identity import identity as identity_of
from torch_xlstm_ops.runtime import devices


class Progress(NamedTuple):
    """The progress of `prefill` after a piece: tokens of the piece, tokens read in all, the total, speed, time left.

    position counts resumed tokens, tokens_per_second does not; total is None if the stream has no length.
    """

    tokens: int  # of the last piece
    position: int  # tokens read, resumed ones included
    total: int | None  # None if the stream has no length
    tokens_per_second: float  # of this call, without resumed tokens
    seconds_left: float | None


class StreamError(RuntimeError):
    """The stream of tokens raised `__cause__`.

    snapshot: after the last whole piece; None before it.
    waiting: the tokens that came after it. Reading `waiting` and the rest of the stream from `snapshot` gives what the
        whole stream would have given.
    position: tokens that the stream gave.
    """

    def __init__(self, snapshot: Snapshot | None, source: TokenSource, cause: BaseException | None) -> None:
        self.snapshot, self.waiting, self.position = snapshot, source.waiting, source.given
        super().__init__(f"the stream of tokens raised {type(cause).__name__} after {self.position} tokens: {cause}")


def prefill(
    model: Any, tokens: Iterable[int], *, start: Snapshot | None = None, pool: SnapshotStore | None = None,
    segment: int | None = None, file: str | Path | None = None, save_every: int = 16,
    progress: Callable[[Progress], None] | None = None, identify: bool = True,
) -> Snapshot:
    """Read tokens with a transformers xLSTM; return its state after the last one and the logits of the next.

    Memory does not grow with the number of tokens, except that of a pool. Pieces end at multiples of `segment` from
    the beginning, so a reading that was interrupted there and resumed gives the same bits as one that was not.

    tokens: a list, a tensor (S,), or any iterable; `text_tokens` makes one of a file.
    start: the state before the first of `tokens`; default an empty one.
    pool: where to look for the longest prefix of `tokens` that was already read in such pieces, and where the state
        after each piece is put.
    segment: tokens per piece; default what suits the device and its free memory, or what `start` or `file` was read in.
    file: where the state is saved after every `save_every` pieces, at the end, and when reading is interrupted. A
        state that is already there is resumed; `tokens` must begin with those that it was saved after.
    progress: called after every piece.
    identify: give the state the model's identity, which takes one pass over all weights per process; default True.
        Without it no pool and no file can keep the state, and it is not checked against the model that resumes it.

    A piece that runs out of memory is read in halves, with a warning, and so are the pieces after it.

    Raises StreamError, from which reading can be resumed, if `tokens` raises; ValueError for tokens that the model
    does not know, for no tokens, for a `start` or `file` of another model, or a `file` of other tokens.
    """
    _check(start, pool, file, save_every, identify)
    source = TokenSource(tokens, adapter.vocabulary_size(model), 0 if start is None else start.position)
    checkpoint = Checkpoint(None if file is None else Path(file), save_every)
    start = start or checkpoint.load(model)
    used = start.segment if segment is None and start is not None else segment
    size = PieceSize(model, adapter.device_of(model), used, fixed=segment is not None)
    reader = PromptReader(model, source, size, pool, identity_of(model) if identify else states.UNIDENTIFIED)
    try:
        if file is None and start is not None:
            reader.resume(start)
        else:
            reader.resume_prefix(start, f"the state in {file}")
        checkpoint.saved = reader.last
        clock = _Clock(reader, progress)
        while reader.advance():
            checkpoint.count_piece(reader.last)
            clock.count_piece()
    except TokenStreamFailed as error:
        raise StreamError(reader.last, source, error.__cause__) from error.__cause__
    finally:
        checkpoint.save(reader.last)
    if reader.last is None:
        raise ValueError("tokens must hold at least one, got none")
    return reader.last


def _check(start: Snapshot | None, pool: SnapshotStore | None, file: object, save_every: int, identify: bool) -> None:
    if save_every < 1:
        raise ValueError(f"save_every must be a whole number of at least 1, got {save_every}")
    if start is not None and (pool is not None or file is not None):
        raise ValueError("start must come without pool and file, which hold states to start from, got both")
    if not identify and (pool is not None or file is not None):
        raise ValueError("identify must be True with pool or file, got False")


class _Clock:
    """Measure tokens per second and report the progress, if there is a callback."""

    def __init__(self, reader: PromptReader, report: Callable[[Progress], None] | None) -> None:
        self._reader, self._report = reader, report
        self._began = self._before = reader.position
        self._start = time.perf_counter()

    def count_piece(self) -> None:
        """Report the progress after a piece."""
        if self._report is None:
            return
        devices.synchronize(self._reader.device)
        position, left = self._reader.position, self._reader.source.left
        rate = (position - self._began) / max(time.perf_counter() - self._start, 1e-9)
        self._report(Progress(position - self._before, position, None if left is None else position + left, rate,
                              None if left is None else left / rate))
        self._before = position
