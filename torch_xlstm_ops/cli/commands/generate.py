"""`xlstm-ops generate`: write text with an xLSTM and measure it."""

from __future__ import annotations

import argparse

from torch_xlstm_ops import config
from torch_xlstm_ops.cli.generation import request, runner
from torch_xlstm_ops.cli.shared.errors import check_extra
from torch_xlstm_ops.cli.shared.quiet import third_party_messages_hidden

HELP = "write text with an xLSTM and time it"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `generate`."""
    parser.add_argument("--model", metavar="DIR", help="Hugging Face directory of an xLSTM (default: the embedded one)")
    parser.add_argument("--prompt", metavar="TEXT", help="text to continue (default: two lines of Python)")
    parser.add_argument("--prompt-file", metavar="FILE", help="file with the text to continue")
    parser.add_argument("--pool", metavar="DIR", help="save the prompt's states in this folder, and resume from them")
    parser.add_argument("--resume", metavar="FILE", help="save a long prompt's state in this file now and then, and "
                        "resume from it")
    parser.add_argument("--stop", metavar="TEXT", action="append", default=[], help="end before this text; repeatable")
    parser.add_argument("--no-patch", action="store_true", help="run transformers' own code instead of ours")
    parser.add_argument("--quiet", action="store_true", help="write the text only: no progress, no table")
    for option in request.OPTIONS:
        default = "" if option.default is None else f" (default {option.default})"
        parser.add_argument(option.flag, metavar=option.metavar, help=option.help + default)
    config.add_flags(parser)


def execute(parsed: argparse.Namespace) -> int:
    """Write the text and return the exit status. Raises BadInput."""
    check_extra("generate")
    wanted = request.read(parsed)
    with third_party_messages_hidden():
        return runner.write_text(wanted)
