"""`xlstm-ops run`: run a script as Python would, with the packages that it imports patched."""

from __future__ import annotations

import argparse
import importlib.util
import os
import runpy
import sys
from pathlib import Path

from torch_xlstm_ops.cli.shared.errors import BadInput
from torch_xlstm_ops.config import PATCH_VARIABLE
from torch_xlstm_ops.patch import PACKAGES
from torch_xlstm_ops.patch.on_import import Watch, patch_on_import

HELP = "run a Python script with the packages it imports patched"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `run`, which come before the script; arguments after it are the script's own."""
    parser.usage = "xlstm-ops run [--only NAMES] [--compat] [--report] (SCRIPT | -m MODULE) [ARGUMENT ...]"
    parser.add_argument("--only", metavar="NAMES", help=f"packages to patch, commas between: {', '.join(PACKAGES)}")
    parser.add_argument("--compat", action="store_true", help="repeat what a package computes wrong")
    parser.add_argument("--report", action="store_true", help="say at the end, on stderr, what was replaced")
    parser.add_argument("-m", dest="module", action="store_true", help="SCRIPT is a module's name")
    parser.add_argument("script", metavar="SCRIPT", help="a Python file")
    parser.add_argument("arguments", metavar="ARGUMENT", nargs=argparse.REMAINDER, help="what the script gets")


def execute(parsed: argparse.Namespace) -> int:
    """Run the script in this process; its exceptions and exit status reach the caller.

    Raises BadInput if the script, the module or a package to patch does not exist.
    """
    _check_script(parsed)
    names = [] if parsed.only is None else [name.strip() for name in parsed.only.split(",")]
    try:
        watch = patch_on_import(*names, compat=parsed.compat)
    except ValueError as error:
        raise BadInput(f"--only: {error}") from error
    os.environ[PATCH_VARIABLE] = ",".join(names) or "auto"  # for processes that the script starts
    try:
        _run_script(parsed)
    finally:
        if parsed.report:
            _print_report(watch)
    return 0


def _check_script(parsed: argparse.Namespace) -> None:
    if not parsed.module:
        if not Path(parsed.script).is_file():
            raise BadInput(f"SCRIPT must be a Python file, got {parsed.script}")
        return
    sys.path[0] = os.getcwd()
    try:
        found = importlib.util.find_spec(parsed.script)
    except (ImportError, ValueError):
        found = None
    if found is None:
        raise BadInput(f"-m must be followed by a module that can be imported, got {parsed.script}")


def _run_script(parsed: argparse.Namespace) -> None:
    sys.argv = [parsed.script, *parsed.arguments]
    if parsed.module:
        runpy.run_module(parsed.script, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(parsed.script).resolve().parent)
        runpy.run_path(parsed.script, run_name="__main__")


def _print_report(watch: Watch) -> None:
    lines = watch.report() or ("nothing was patched: the script imported no supported package",)
    print("\n".join(lines), file=sys.stderr)
