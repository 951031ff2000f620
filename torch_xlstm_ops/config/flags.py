"""The settings as flags of a command line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch_xlstm_ops.config.settings import SETTINGS

if TYPE_CHECKING:
    import argparse


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each setting to `parser`; `reload` checks the text, with the same errors as for other sources."""
    group = parser.add_argument_group("schedule")
    for setting in SETTINGS.values():
        group.add_argument(setting.flag, dest=setting.field, metavar=setting.metavar,
                           help=f"{setting.help}: {setting.kind.expects}")


def given_flags(parsed: argparse.Namespace) -> dict[str, str]:
    """Return the text of the flags of `add_flags` that the user gave, by field, for `reload`."""
    return {field: text for field in SETTINGS if (text := getattr(parsed, field)) is not None}
