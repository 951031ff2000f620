"""Read a prompt of any length in constant memory, piece by piece, and never lose the place."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from torch_xlstm_ops.context import codec, states
from torch_xlstm_ops.context.piece_size import Allocation
from torch_xlstm_ops.context.reader import Pool, Reader
from torch_xlstm_ops.context.states import Snapshot
from torch_xlstm_ops.context.tokens import Broken, Source
from torch_xlstm_ops.runtime import devices


class Progress(NamedTuple):
    """How far a reading is."""

    tokens: int  # of the last piece
    position: int  # tokens behind us
    total: int | None  # None where the stream does not tell
    tokens_per_second: float  # of this reading, without what was resumed
    seconds_left: float | None


class StreamError(RuntimeError):
    """A stream of tokens raised; `__cause__` says what.

    snapshot: after the last whole piece; None before it.
    waiting: the tokens that came after it. Reading `waiting` and what the stream still has, from `snapshot` on, gives
        what the whole stream would have given.
    position: tokens that the stream gave.
    """

    def __init__(self, snapshot: Snapshot | None, source: Source, cause: BaseException | None) -> None:
        self.snapshot, self.waiting, self.position = snapshot, source.waiting, source.given
        super().__init__(f"tokens must come to their end, got {type(cause).__name__} after {self.position}: {cause}")


def prefill(
    model: Any, tokens: Iterable[int], *, start: Snapshot | None = None, pool: Pool | None = None,
    segment: int | None = None, file: str | Path | None = None, save_every: int = 16,
    progress: Callable[[Progress], None] | None = None, identify: bool = True,
) -> Snapshot:
    """Read tokens with a transformers xLSTM; return its state after the last, with the logits of what follows.

    Memory does not grow with the tokens, but for a pool's own. A piece ends at a multiple of `segment` counted from
    the beginning, so a reading that was cut at such places gives the same bits as one that was not.

    tokens: a list, a tensor (S,), or any iterable; `text_tokens` makes one of a file.
    start: what was read before the first of `tokens`; default nothing.
    pool: where to look for the longest beginning of `tokens` that was read already in such pieces, and where the
        state after each piece is put.
    segment: tokens a piece; default what suits the device and its free memory, or what `start` or `file` was read in.
    file: where the state is saved after every `save_every` pieces, at the end, and when reading is interrupted; a
        state that is there already is where reading goes on, in tokens that must be given from the beginning again.
    progress: called after every piece.
    identify: whether the state gets the model's identity, which takes a pass over all weights once in a process.
        Without, no pool and no file keeps it, and nothing keeps another model from going on with it.

    A piece that finds no memory is read in halves, with a warning, and so is what follows.

    Raises StreamError, which has the place, when `tokens` raises; ValueError for tokens that the model does not know,
    for none at all, for a `start` or `file` of another model, or a `file` of other tokens.
    """
    _check(start, pool, file, save_every, identify)
    source = Source(tokens, model.get_input_embeddings().num_embeddings, 0 if start is None else start.position)
    checkpoint = _Checkpoint(None if file is None else Path(file), save_every)
    start = start or checkpoint.load(model)
    used = start.segment if segment is None and start is not None else segment
    allocation = Allocation(model, states.device_of(model), used, fixed=segment is not None)
    reader = Reader(model, source, allocation, pool, states.identity(model) if identify else states.UNKNOWN)
    try:
        if file is None and start is not None:
            reader.go_on(start)
        else:
            reader.find(start, f"the state in {file}")
        checkpoint.saved = reader.last
        clock = _Clock(reader, progress)
        while reader.advance():
            checkpoint.piece(reader.last)
            clock.piece()
    except Broken as error:
        raise StreamError(reader.last, source, error.__cause__) from error.__cause__
    finally:
        checkpoint.save(reader.last)
    if reader.last is None:
        raise ValueError("tokens must hold at least one, got none")
    return reader.last


def _check(start: Snapshot | None, pool: Pool | None, file: object, save_every: int, identify: bool) -> None:
    if save_every < 1:
        raise ValueError(f"save_every must be a whole number of at least 1, got {save_every}")
    if start is not None and (pool is not None or file is not None):
        raise ValueError("start must come without pool and file, which know where to start, got both")
    if not identify and (pool is not None or file is not None):
        raise ValueError("identify must be True with pool or file, got False")


class _Checkpoint:
    """The file in which a reading's state outlives its process, or none."""

    def __init__(self, path: Path | None, every: int) -> None:
        self.saved: Snapshot | None = None  # what the file holds, or what reading began with
        self._path, self._every, self._pieces = path, every, 0

    def load(self, model: Any) -> Snapshot | None:
        """Return the state in the file, None where there is none; a damaged one is none, with a warning.

        Raises Refused for a file that is not one of ours, which it would be a pity to write over.
        """
        if self._path is None or not self._path.exists():
            return None
        try:
            snapshot = codec.unpack(codec.from_file(self._path), states.device_of(model))
        except codec.Damaged as error:
            if not codec.is_ours(self._path):
                raise states.Refused(f"file must be a state that was saved, got {self._path}, which is something else"
                                     ) from None
            warnings.warn(f"reading begins at the first token: {error}", RuntimeWarning, stacklevel=3)
            return None
        states.check_fits(model, snapshot)
        return snapshot

    def piece(self, snapshot: Snapshot | None) -> None:
        """Count a piece, and save the state if it is time."""
        self._pieces += 1
        if self._pieces % self._every == 0:
            self.save(snapshot)

    def save(self, snapshot: Snapshot | None) -> None:
        """Save a state that the file does not hold; where that is impossible a warning says so, and reading goes on."""
        if self._path is None or snapshot is None or snapshot is self.saved:
            return
        try:
            codec.write_whole(self._path, codec.to_file(codec.pack(snapshot)))
        except OSError as error:
            warnings.warn(f"the state after {snapshot.position} tokens must be saved in {self._path}, got "
                          f"{error.strerror}", RuntimeWarning, stacklevel=3)
        else:
            self.saved = snapshot


class _Clock:
    """Tokens a second, when somebody wants to know."""

    def __init__(self, reader: Reader, report: Callable[[Progress], None] | None) -> None:
        self._reader, self._report = reader, report
        self._began = self._before = reader.position
        self._start = time.perf_counter()

    def piece(self) -> None:
        """Report a piece that was read."""
        if self._report is None:
            return
        devices.synchronize(self._reader.device)
        position, left = self._reader.position, self._reader.source.left
        rate = (position - self._began) / max(time.perf_counter() - self._start, 1e-9)
        self._report(Progress(position - self._before, position, None if left is None else position + left, rate,
                              None if left is None else left / rate))
        self._before = position
