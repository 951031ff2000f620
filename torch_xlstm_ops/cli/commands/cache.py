"""`xlstm-ops cache`: list a folder of states, make it smaller, and check every file in it."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path

from torch_xlstm_ops.cli.shared import amounts
from torch_xlstm_ops.cli.shared.actions import About, describe
from torch_xlstm_ops.cli.shared.errors import BadInput, check_extra
from torch_xlstm_ops.cli.shared.table import aligned
from torch_xlstm_ops.context.pool.disk import DiskEntry, DiskTier

HELP = "list, prune and verify a folder of states"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `cache`."""
    action = parser.add_argument("action", choices=list(_ACTIONS))
    pool = parser.add_argument("--pool", metavar="DIR", required=True, help="folder of states, as given to generate")
    size = parser.add_argument("--bytes", metavar="SIZE",
                               help="what prune leaves: a number of bytes, or with K, M, G or T")
    remove = parser.add_argument("--remove", action="store_true", help="verify removes what is damaged")
    describe(parser, action, {
        "ls": About("list every state", "ls --pool DIR", (pool,)),
        "stats": About("print totals for each model", "stats --pool DIR", (pool,)),
        "prune": About("remove the states that were not used for longest and are not pinned",
                       "prune --pool DIR --bytes SIZE", (pool, size)),
        "verify": About("read every file, and list the damaged ones", "verify --pool DIR [--remove]", (pool, remove)),
    })


def execute(parsed: argparse.Namespace) -> int:
    """Execute the action, and return the exit status: 1 if a file is damaged.

    Raises BadInput for flags that do not fit, a folder that does not exist, or one that prune cannot write.
    """
    check_extra("cache")
    for flag, action in (("bytes", "prune"), ("remove", "verify")):
        if getattr(parsed, flag) and parsed.action != action:
            raise BadInput(f"--{flag} must come with {action}, got {parsed.action}")
    if parsed.action == "prune":
        amounts.size(parsed.bytes)
    folder = Path(parsed.pool)
    if not folder.is_dir():
        raise BadInput(f"--pool must be a folder of states, got {folder}, which is no folder")
    return _ACTIONS[parsed.action](DiskTier(folder), parsed)


def _list(disk: DiskTier, parsed: argparse.Namespace) -> int:
    rows = [("model", "tokens", "piece", "bytes", "used", "")]
    for entry in reversed(disk.entries()):
        rows.append((entry.identity[:12], str(entry.name.position), str(entry.name.segment or "any"), str(entry.size),
                     amounts.ago(entry.used), "pinned" if entry.pinned else ""))
    print(aligned(rows))
    return 0


def _stats(disk: DiskTier, parsed: argparse.Namespace) -> int:
    everything = disk.entries()
    models: dict[str, list[DiskEntry]] = {}
    for entry in everything:
        models.setdefault(entry.identity, []).append(entry)
    rows = [("model", "states", "pinned", "longest", "bytes")]
    for identity, entries in [*models.items(), ("all", everything)]:
        longest = max((entry.name.position for entry in entries), default=0)
        rows.append((identity[:12], str(len(entries)), str(sum(entry.pinned for entry in entries)), str(longest),
                     str(sum(entry.size for entry in entries))))
    print(aligned(rows))
    return 0


def _prune(disk: DiskTier, parsed: argparse.Namespace) -> int:
    budget = amounts.size(parsed.bytes)
    try:
        removed = disk.prune(budget)
    except OSError as error:
        raise BadInput(f"--pool must be a folder that can be written, got {disk.folder}: {error}") from error
    left = disk.usage()
    print(f"{len(removed)} states removed, {sum(entry.size for entry in removed)} bytes; {left.states} left, "
          f"{left.bytes} bytes, {left.pinned} pinned")
    return 0


def _verify(disk: DiskTier, parsed: argparse.Namespace) -> int:
    found = ((wrong, functools.partial(disk.remove, entry.name)) for entry, wrong in disk.verify())
    return amounts.verified(found, "states", remove=parsed.remove)


_ACTIONS: dict[str, Callable[[DiskTier, argparse.Namespace], int]] = {
    "ls": _list, "stats": _stats, "prune": _prune, "verify": _verify,
}
