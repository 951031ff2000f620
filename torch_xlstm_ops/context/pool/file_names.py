"""What the files of a folder of states are called, and what their names promise."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from torch_xlstm_ops.context.codec import SUFFIX, Damaged, Packed

PIN = ".pin"


class Name(NamedTuple):
    """What a file's name says."""

    path: Path
    position: int
    digest: str
    segment: int | None

    @property
    def pin(self) -> Path:
        """Return the file that is there while this one is pinned."""
        return self.path.with_suffix(PIN)

    def set_pin(self, pinned: bool) -> None:
        """Keep the file whatever room is needed, or let it go when its turn comes. Raises OSError."""
        if pinned:
            self.pin.touch()
        else:
            self.pin.unlink(missing_ok=True)


def name_of(folder: Path, packed: Packed) -> Name:
    """Return the name of a snapshot's file."""
    about = packed.about
    position, digest, segment = int(about["position"]), about["digest"], int(about["segment"])
    stem = f"{position:012d}-{digest}-{segment}"
    return Name(folder / about["identity"] / (stem + SUFFIX), position, digest, segment or None)


def parse(path: Path) -> Name | None:
    """Return what a file's name says, None where it is not a snapshot's."""
    parts = path.stem.split("-")
    if path.suffix != SUFFIX or len(parts) != 3 or not (parts[0].isdecimal() and parts[2].isdecimal()):
        return None
    return Name(path, int(parts[0]), parts[1], int(parts[2]) or None)


def check_name(packed: Packed, name: Name) -> None:
    """Raise Damaged unless a file holds what its name says."""
    if name_of(name.path.parent.parent, packed) != name:
        raise Damaged(f"{name.path} must hold what its name says, got the state of {packed.about['identity']} after "
                      f"{packed.about['position']} tokens")
