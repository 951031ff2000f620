"""The names of the state files in a pool's folder, and what a name says about the state."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from torch_xlstm_ops.context.codec import EncodedSnapshot
from torch_xlstm_ops.context.state_file import SUFFIX, DamagedFile

PIN = ".pin"
# O_NOFOLLOW: a link must not create a file outside the pool's folder.
_PIN_FLAGS = os.O_WRONLY | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


class StateName(NamedTuple):
    """What a file's name says."""

    path: Path
    position: int
    digest: str
    segment: int | None

    @property
    def pin(self) -> Path:
        """Return the file that exists while this one is pinned."""
        return self.path.with_suffix(PIN)

    def set_pin(self, pinned: bool) -> None:
        """Protect the file from eviction, or end the protection. Raises OSError, also for a pin that is a link."""
        if pinned:
            os.close(os.open(self.pin, _PIN_FLAGS, 0o666))
        else:
            self.pin.unlink(missing_ok=True)


def name_of(folder: Path, encoded: EncodedSnapshot) -> StateName:
    """Return the name of a snapshot's file."""
    about = encoded.about
    position, digest, segment = int(about["position"]), about["digest"], int(about["segment"])
    stem = f"{position:012d}-{digest}-{segment}"
    return StateName(folder / about["identity"] / (stem + SUFFIX), position, digest, segment or None)


def parse(path: Path) -> StateName | None:
    """Return what a file's name says, None for the name of another file."""
    parts = path.stem.split("-")
    if path.suffix != SUFFIX or len(parts) != 3 or not (parts[0].isdecimal() and parts[2].isdecimal()):
        return None
    return StateName(path, int(parts[0]), parts[1], int(parts[2]) or None)


def check_name(encoded: EncodedSnapshot, name: StateName) -> None:
    """Raise DamagedFile unless a file holds the state that its name says."""
    if name_of(name.path.parent.parent, encoded) != name:
        raise DamagedFile(f"{name.path} does not hold the state that its name says, but that of "
                          f"{encoded.about['identity']} after {encoded.about['position']} tokens")
