"""Tables of a command's own flags; those of the schedules are in `config`."""

from __future__ import annotations

from typing import NamedTuple

from torch_xlstm_ops import config
from torch_xlstm_ops.cli.shared.errors import bad_input
from torch_xlstm_ops.config import Kind


class Option(NamedTuple):
    """One flag: what it accepts, its default and its help."""

    name: str
    kind: Kind
    metavar: str
    default: object
    help: str

    @property
    def flag(self) -> str:
        """Return the command-line flag."""
        return "--" + self.name.replace("_", "-")


def one_of(*names: str) -> Kind:
    """Return the kind of a choice among names."""
    return Kind("one of " + ", ".join(names), str, lambda value: value in names)


COUNT = Kind("a whole number of at least 0", int, lambda v: type(v) is int and v >= 0)


def parse(option: Option, text: str | None) -> object:
    """Return the value of a flag, or its default. Raises BadInput."""
    if text is None:
        return option.default
    with bad_input():
        return config.check(option.kind, text, option.flag, text=True)
