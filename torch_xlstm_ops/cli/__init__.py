"""`xlstm-ops`: one module per command in `commands`.

Input that cannot be used ends with one line on stderr and exit status 2, before a model is loaded or a file is written.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn, Protocol

import torch_xlstm_ops
from torch_xlstm_ops.cli.commands import cache, check, generate, info, kernels, run, tune
from torch_xlstm_ops.cli.shared.errors import BadInput
from torch_xlstm_ops.runtime.extras import how_to_install


class Command(Protocol):
    """What a module in `commands` has."""

    HELP: str

    def add_flags(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's flags."""

    def execute(self, parsed: argparse.Namespace) -> int:
        """Run the command and return the exit status. Raises BadInput."""


COMMANDS: dict[str, Command] = {
    "generate": generate, "run": run, "check": check, "tune": tune, "cache": cache, "kernels": kernels,
    "info": info,
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadInput(message)


class _Completion(argparse.Action):
    """Print what completes our command lines in a shell."""

    def __call__(
        self, whole: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        try:
            import shtab
        except ImportError:
            raise BadInput(f"--completion needs shtab: {how_to_install('completion')}") from None
        if values not in shtab.SUPPORTED_SHELLS:
            raise BadInput(f"--completion must be one of {', '.join(shtab.SUPPORTED_SHELLS)}, got {values!r}")
        print(shtab.complete(whole, values))
        whole.exit()


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    whole = _Parser(prog="xlstm-ops", description="xLSTM operators for PyTorch.", allow_abbrev=False)
    whole.add_argument("--version", action="version", version=torch_xlstm_ops.__version__)
    whole.add_argument("--completion", metavar="SHELL", action=_Completion,
                       help="print completions for bash, zsh, fish or tcsh, and exit")
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.add_flags(commands.add_parser(name, help=command.HELP, allow_abbrev=False))
    return whole


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `xlstm-ops` and return its exit status: 2 for input that cannot be used, 130 after an interrupt."""
    try:
        parsed = parser().parse_args(arguments)
        return COMMANDS[parsed.command].execute(parsed)
    except BadInput as error:
        print(f"xlstm-ops: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of stdout left; the interpreter must not flush to it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
