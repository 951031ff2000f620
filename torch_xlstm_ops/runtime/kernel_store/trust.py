"""Whether only this user, or the administrator, can have written a file: loading a kernel runs it."""

from __future__ import annotations

import os
import stat
from pathlib import Path


class Untrusted(ValueError):
    """Others can write a file or a folder; the message names it and the reason."""


def check(path: Path) -> None:
    """Raise Untrusted if others can write a file or folder, or it is a link. Raises OSError if it is not there."""
    about = os.lstat(path)
    if stat.S_ISLNK(about.st_mode):
        raise Untrusted(f"{path} is a link: name what it points to")
    if about.st_uid not in (os.geteuid(), 0):
        raise Untrusted(f"{path} belongs to another user (id {about.st_uid}): name a folder of your own")
    if about.st_mode & 0o022:
        mode = stat.S_IMODE(about.st_mode)
        raise Untrusted(f"others can write {path} (mode {mode:o}): chmod go-w {path}, if nobody has changed it")
