"""The file in which `prefill` saves its state, so that another process can resume it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch_xlstm_ops.context import codec, state_file, states
from torch_xlstm_ops.context.states import Snapshot
from torch_xlstm_ops.models import transformers as adapter


class Checkpoint:
    """A file that is written after every `every` pieces; path: None for no file."""

    def __init__(self, path: Path | None, every: int) -> None:
        self.saved: Snapshot | None = None  # what the file holds, or the state that reading started from
        self._path, self._every, self._pieces = path, every, 0

    def load(self, model: Any) -> Snapshot | None:
        """Return the state in the file, None if there is no file, or a damaged one, with a warning.

        Raises StateMismatch for a file that is not a state, so that it is not overwritten.
        """
        if self._path is None or not self._path.exists():
            return None
        try:
            encoded = state_file.read(self._path)
            states.check_identity(model, encoded.about["identity"])
            if (wrong := codec.mismatch(encoded, states.outline(model))) is not None:
                raise state_file.DamagedFile(f"{self._path} does not fit the model: {wrong}")
        except state_file.DamagedFile as error:
            self._refuse_foreign()
            warnings.warn(f"the prompt is read from its first token: {error}", RuntimeWarning, stacklevel=3)
            return None
        return codec.decode(encoded, adapter.device_of(model))

    def _refuse_foreign(self) -> None:
        assert self._path is not None
        if not self._path.is_file() or not state_file.is_state(self._path):
            raise states.StateMismatch(f"file must be a state that was saved, got {self._path}, which is something else"
                                       ) from None

    def count_piece(self, snapshot: Snapshot | None) -> None:
        """Count a piece, and save the state if it is time."""
        self._pieces += 1
        if self._pieces % self._every == 0:
            self.save(snapshot)

    def save(self, snapshot: Snapshot | None) -> None:
        """Save a state that the file does not hold; if that is impossible, warn."""
        if self._path is None or snapshot is None or snapshot is self.saved:
            return
        try:
            state_file.write(self._path, state_file.to_bytes(codec.encode(snapshot)))
        except OSError as error:
            warnings.warn(f"could not save the state after {snapshot.position} tokens to {self._path}: "
                          f"{error.strerror}", RuntimeWarning, stacklevel=3)
        else:
            self.saved = snapshot
