"""`xlstm-ops`: one module per command in `commands`.

Input that cannot be used ends with one line on stderr and exit status 2, before a model is loaded or a file is written.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TextIO

import torch_xlstm_ops
from torch_xlstm_ops.cli.commands import cache, check, generate, info, kernels, run, tune
from torch_xlstm_ops.cli.shared.actions import Help, sentence
from torch_xlstm_ops.cli.shared.errors import BadInput
from torch_xlstm_ops.runtime.extras import how_to_install

if TYPE_CHECKING:
    from _typeshed import SupportsWrite


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

    def _print_message(self, message: str, file: SupportsWrite[str] | None = None) -> None:
        """Print help or the version; argparse itself would not tell that the output is full."""
        print(message, end="", file=file or sys.stderr)


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
        added = commands.add_parser(name, help=command.HELP, description=sentence(command.HELP), allow_abbrev=False,
                                    add_help=False)
        added.add_argument("-h", "--help", action=Help)
        command.add_flags(added)
    return whole


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `xlstm-ops` and return its exit status.

    2 for input that cannot be used, 130 after an interrupt, 1 if the output or a file cannot be written.
    """
    _open_closed_streams()
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        return _run(given)
    except BadInput as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of stdout left
        _discard_output(sys.stdout)
        return 1
    except OSError as error:
        if given[:1] == ["run"]:  # the script's own
            raise
        _discard_output(sys.stdout)
        where = "the output" if error.filename is None else error.filename
        return _fail(f"could not read or write {where}: {error.strerror or error}", 1)


def _run(arguments: Sequence[str]) -> int:
    try:
        parsed = parser().parse_args(arguments)
        status = COMMANDS[parsed.command].execute(parsed)
    except SystemExit:  # of --help, --version, or a script
        sys.stdout.flush()
        raise
    sys.stdout.flush()  # here an error can still be told
    return status


def _fail(message: str, status: int) -> int:
    try:
        print(f"xlstm-ops: error: {message}", file=sys.stderr, flush=True)
    except OSError:
        _discard_output(sys.stderr)
    return status


def _open_closed_streams() -> None:
    """Let output that nobody can read, as its file is closed, go nowhere."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115


def _discard_output(stream: TextIO) -> None:
    """Drop what is buffered and could not be written: the interpreter would write it at exit, and end with 120."""
    with suppress(OSError, ValueError):  # ValueError: a stream without a file, as in tests
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
