"""Commands with actions, as `cache prune`: the help of an action shows the flags of that action alone."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class About(NamedTuple):
    """What the help of an action shows."""

    text: str
    usage: str  # after the name of the command
    flags: tuple[argparse.Action, ...]


class Help(argparse.Action):
    """`-h` of a command: print its help, or the help of the action before it, and exit."""

    def __init__(self, option_strings: list[str], **unused: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS,
                         help="show this help message and exit")

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        about: Mapping[str, About] = parser.get_default("about_actions") or {}
        chosen = about.get(getattr(namespace, "action", None) or "")
        if chosen is not None:
            for argument in parser.get_default("not_of_all_actions").difference(chosen.flags):
                argument.help = argparse.SUPPRESS
            parser.usage, parser.description = f"{parser.prog} {chosen.usage}", sentence(chosen.text)
        parser.print_help()
        parser.exit()


def describe(
    parser: argparse.ArgumentParser, action: argparse.Action, about: Mapping[str, About],
    others: Sequence[argparse.Action] = (),
) -> None:
    """Tell a command's parser about its actions.

    action: the argument that names one, of dest ``action``. others: arguments of no action.
    """
    action.help = "; ".join(f"{name}: {one.text}" for name, one in about.items())
    flags = {action, *others, *(flag for one in about.values() for flag in one.flags)}
    parser.set_defaults(about_actions=about, not_of_all_actions=flags)


def sentence(text: str) -> str:
    """Return a text with a capital letter and a full stop."""
    return f"{text[:1].upper()}{text[1:]}."
