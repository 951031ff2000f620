"""`xlstm-ops`: `generate` writes text with an xLSTM and measures it, `run` runs a script on our operators, `check`
holds every operator to the recurrence on a device, `tune` searches for the fastest plans, `cache` looks after a folder
of states, `info` says what this machine can do.

What cannot be used ends with one line on stderr and exit status 2, before a model is loaded or a file is touched.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import torch_xlstm_ops
from torch_xlstm_ops import config
from torch_xlstm_ops.cli.commands import cache, check, info, run, tune
from torch_xlstm_ops.cli.generation import request, runner
from torch_xlstm_ops.cli.shared import third_party
from torch_xlstm_ops.cli.shared.loading import BadInput, check_extra
from torch_xlstm_ops.runtime import devices
from torch_xlstm_ops.trace import export


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadInput(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="xlstm-ops", description="xLSTM operators for PyTorch.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=torch_xlstm_ops.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    write = commands.add_parser("generate", help="write text with an xLSTM and time it", allow_abbrev=False)
    request.add_flags(write)
    start = commands.add_parser("run", help="run a Python script with the packages it imports patched",
                                allow_abbrev=False)
    run.add_flags(start)
    hold = commands.add_parser("check", help="compare every operator with the recurrence on a device, and time it",
                               allow_abbrev=False)
    check.add_flags(hold)
    seek = commands.add_parser("tune", help="search for the plans that are fastest here", allow_abbrev=False)
    tune.add_flags(seek)
    keep = commands.add_parser("cache", help="look after a folder of states", allow_abbrev=False)
    cache.add_flags(keep)
    tell = commands.add_parser("info", help="say what this machine can do", allow_abbrev=False)
    tell.add_argument("--device", metavar="NAME", help="ask the schedules about auto, cpu, cuda or mps (default auto)")
    config.add_flags(tell)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `xlstm-ops` and return its exit status: 2 for what cannot be used, 130 when interrupted."""
    try:
        parsed = _parser().parse_args(arguments)
        return {"generate": _generate, "run": run.run, "check": _check, "cache": cache.run, "tune": tune.run,
                "info": _info}[parsed.command](parsed)
    except BadInput as error:
        print(f"xlstm-ops: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output left; keep the interpreter from flushing to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _generate(parsed: argparse.Namespace) -> int:
    check_extra("generate")
    wanted = request.read(parsed)
    with third_party.hidden():
        return runner.run(wanted)


def _check(parsed: argparse.Namespace) -> int:
    with request.bad_input():
        if parsed.json is not None:
            export.check_file("--json", parsed.json)
        device = devices.resolve_device(parsed.device)
    return check.run(device, parsed.json, parsed.seconds)


def _info(parsed: argparse.Namespace) -> int:
    with request.bad_input():
        config.reload(flags=config.given_flags(parsed))
        print(info.report(devices.resolve_device(parsed.device or "auto")))
    return 0
