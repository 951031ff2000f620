"""The packages that we know how to patch, and what is there of them.

A package is what can be imported under its name: a fork that pip calls something else is the package too, as long as
it looks as we know it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
from typing import NamedTuple


class Peer(NamedTuple):
    """A package we know how to patch."""

    drop_in: str  # our module, imported when asked for
    distribution: str  # what pip installs
    minimum: tuple[int, int]  # the oldest release we were tested with
    newest: tuple[int, int]  # and the newest
    seam: str  # the module of theirs after whose import everything that we replace is there

    @property
    def requirement(self) -> str:
        """What to hand to ``pip install``."""
        return f"{self.distribution}>={self.minimum[0]}.{self.minimum[1]}"

    @property
    def tested(self) -> str:
        """The releases that we were tested with."""
        oldest, newest = (".".join(map(str, version)) for version in (self.minimum, self.newest))
        return oldest if oldest == newest else f"{oldest} to {newest}"


class Found(NamedTuple):
    """What a package says of itself."""

    version: str | None  # None where no distribution that is installed has the package
    distribution: str | None  # as pip calls it

    def __str__(self) -> str:
        return self.version or "of unknown version"


_HERE = "torch_xlstm_ops.patch.upstream"
PEERS = {
    "transformers": Peer(f"{_HERE}.transformers", "transformers", (5, 17), (5, 24),
                         "transformers.models.xlstm.modeling_xlstm"),
    "mlstm_kernels": Peer(f"{_HERE}.mlstm_kernels", "mlstm_kernels", (2, 0), (2, 0),
                          "mlstm_kernels.torch.backend_module"),
    "xlstm": Peer(f"{_HERE}.xlstm", "xlstm", (2, 0), (2, 0), "xlstm"),
    "flashrnn": Peer(f"{_HERE}.flashrnn", "flashrnn", (1, 0), (1, 0), "flashrnn"),
    "tirex": Peer(f"{_HERE}.tirex", "tirex-ts", (1, 4), (1, 4), "tirex"),
    "tirex2": Peer(f"{_HERE}.tirex2", "tirex-2", (0, 4), (0, 4), "tirex2"),
}  # by the name under which they are imported


def row(name: str) -> str:
    """Return the row of `PEERS` for a package, by its own name or pip's. Raises ValueError for one we do not know."""
    by_any_name = {peer.distribution: row for row, peer in PEERS.items()} | {row: row for row in PEERS}
    if name not in by_any_name:
        raise ValueError(f"a package to patch must be one of {', '.join(PEERS)}, got {name!r}")
    return by_any_name[name]


def installed(name: str) -> bool:
    """Return whether a package of the table can be imported."""
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # half-imported: the module is there without a spec
        return name in sys.modules


def found(name: str) -> Found:
    """Return the version of a package that is there, by whichever distribution has it."""
    ours = PEERS[name].distribution
    try:
        return Found(importlib.metadata.version(ours), ours)
    except importlib.metadata.PackageNotFoundError:
        others = importlib.metadata.packages_distributions().get(name)
        return Found(importlib.metadata.version(others[0]), others[0]) if others else Found(None, None)


def is_tested(name: str) -> bool:
    """Return whether a package is there in a release that we were tested with; of a fork we know none.

    Raises ImportError when it is missing, RuntimeError when it is too old.
    """
    peer = PEERS[name]
    if not installed(name):
        raise ImportError(f"{name} is not installed: pip install '{peer.requirement}'")
    version, distribution = found(name)
    numbers = re.match(r"(\d+)\.(\d+)", version or "")
    if distribution != peer.distribution or numbers is None:
        return False
    release = int(numbers[1]), int(numbers[2])
    if release < peer.minimum:
        raise RuntimeError(f"{name} must be {peer.requirement}, got {version}: pip install '{peer.requirement}'")
    return release <= peer.newest
