"""What a user asks of `xlstm-ops generate`, checked before a model is loaded or a file is touched."""

from __future__ import annotations

import argparse
import codecs
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from torch_xlstm_ops import config, schedules
from torch_xlstm_ops.cli.shared.loading import DEMO_MODEL, DTYPES, BadInput, check_directory
from torch_xlstm_ops.config import FRACTION, WHOLE, Kind
from torch_xlstm_ops.context.tokens import BLOCK
from torch_xlstm_ops.runtime import devices
from torch_xlstm_ops.trace import export

DEFAULT_PROMPT = "import os\nimport sys\n\n\n"


class Option(NamedTuple):
    """One row of the table of `generate`'s own flags; the schedule's are in `config`."""

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
    return Kind("one of " + ", ".join(names), str, lambda value: value in names)


COUNT = Kind("a whole number of at least 0", int, lambda v: type(v) is int and v >= 0)
_TEMPERATURE = Kind("a number of at least 0", float, lambda v: isinstance(v, float) and 0 <= v < float("inf"))
_STATS_FILE = Kind("a file name ending in .csv or .json", str, lambda v: str(v).endswith((".csv", ".json")))

OPTIONS = (
    Option("max_new_tokens", WHOLE, "COUNT", 200, "most tokens to write"),
    Option("temperature", _TEMPERATURE, "T", 0.0, "0 always takes the most likely token"),
    Option("top_k", WHOLE, "COUNT", None, "sample among this many of the likeliest tokens"),
    Option("top_p", FRACTION, "P", None, "sample among the likeliest tokens that reach this probability"),
    Option("seed", COUNT, "SEED", 0, "of the sampling"),
    Option("device", one_of("auto", *devices.KINDS), "NAME", "auto", "auto, cpu, cuda or mps"),
    Option("dtype", one_of("auto", *DTYPES), "NAME", "auto", "auto is the checkpoint's, and float32 on the CPU"),
    Option("stats_log", _STATS_FILE, "FILE", None, "write timings of prefill and decode: .csv or .json"),
    Option("prefill_workers", WHOLE, "COUNT", None, "read the prompt by this many Ray actors, each a stretch of it"),
    Option("stats_every", WHOLE, "TOKENS", None, "tokens between two lines of the log (default 16)"),
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the flags of `generate`."""
    parser.add_argument("--model", metavar="DIR", help="Hugging Face directory of an xLSTM (default: the embedded one)")
    parser.add_argument("--prompt", metavar="TEXT", help="text to go on from (default: two lines of Python)")
    parser.add_argument("--prompt-file", metavar="FILE", help="file with the text to go on from")
    parser.add_argument("--pool", metavar="DIR", help="keep the prompt's states here, and go on from those that fit")
    parser.add_argument("--resume", metavar="FILE", help="save a long prompt's state here now and then, and go on from "
                        "what is there")
    parser.add_argument("--stop", metavar="TEXT", action="append", default=[], help="end before this text; repeatable")
    parser.add_argument("--no-patch", action="store_true", help="run transformers' own code instead of ours")
    parser.add_argument("--quiet", action="store_true", help="write the text alone: no progress, no table")
    for option in OPTIONS:
        default = "" if option.default is None else f" (default {option.default})"
        parser.add_argument(option.flag, metavar=option.metavar, help=option.help + default)
    config.add_flags(parser)


@contextmanager
def bad_input() -> Iterator[None]:
    """Report the errors of checks as bad input."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        raise BadInput(str(error)) from error


class Request(NamedTuple):
    """What `generate` was asked, checked."""

    model: Path
    prompt: str | Path  # a path is that of a text longer than `tokens.BLOCK`
    pool: str | None
    resume: str | None
    stops: tuple[str, ...]
    patched: bool
    device: torch.device
    quiet: bool  # the text alone
    values: dict[str, Any]  # by `Option.name`


def read(parsed: argparse.Namespace) -> Request:
    """Check everything that can be checked before a model is loaded."""
    values: dict[str, Any] = {option.name: value(option, getattr(parsed, option.name)) for option in OPTIONS}
    for name in ("top_k", "top_p"):
        if values[name] is not None and values["temperature"] == 0:
            raise BadInput(f"--temperature must be above 0 with --{name.replace('_', '-')}, got 0")
    if any(not stop for stop in parsed.stop):
        raise BadInput("--stop must not be empty, got ''")
    if values["stats_every"] is not None and values["stats_log"] is None:
        raise BadInput(f"--stats-every must come with --stats-log, got {values['stats_every']} without")
    flags = config.given_flags(parsed)
    if parsed.no_patch and (idle := [config.SETTINGS[f].flag for f in flags if f != "trace"]):
        raise BadInput(f"--no-patch must come without flags of our schedules, got {', '.join(idle)}")
    if values["prefill_workers"] is not None:
        _check_prefill_workers(parsed)
    if parsed.pool is not None and Path(parsed.pool).exists() and not Path(parsed.pool).is_dir():
        raise BadInput(f"--pool must be a folder, or one to be made, got {parsed.pool}, which is a file")
    model = Path(parsed.model) if parsed.model is not None else DEMO_MODEL
    check_directory(model)
    prompt = _prompt(parsed)
    with bad_input():
        if values["stats_log"] is not None:
            export.check_file("--stats-log", values["stats_log"])
        if parsed.resume is not None:
            export.check_file("--resume", parsed.resume)
        device = devices.resolve_device(values["device"])
        schedule = config.reload(flags=flags).schedule
        reason = None if parsed.no_patch else schedules.unavailable(schedule, device)
    if reason is not None:
        raise BadInput(f"schedule must be one that can run on {device.type}, got {schedule}: {reason}")
    return Request(model, prompt, parsed.pool, parsed.resume, tuple(parsed.stop), not parsed.no_patch, device,
                   parsed.quiet, values)


def _check_prefill_workers(parsed: argparse.Namespace) -> None:
    given = {"--no-patch": parsed.no_patch, "--pool": parsed.pool is not None, "--resume": parsed.resume is not None}
    if clashing := [flag for flag, is_given in given.items() if is_given]:
        raise BadInput(f"--prefill-workers must come without {', '.join(given)}, got {', '.join(clashing)}")


def value(option: Option, text: str | None) -> object:
    """Return what a flag says, or its default."""
    if text is None:
        return option.default
    with bad_input():
        return config.check(option.kind, text, option.flag, text=True)


def _prompt(parsed: argparse.Namespace) -> str | Path:
    if parsed.prompt is not None and parsed.prompt_file is not None:
        raise BadInput("--prompt must come without --prompt-file, got both")
    name, text = "--prompt", parsed.prompt
    if parsed.prompt_file is not None:
        name = "--prompt-file"
        try:
            text = _read(Path(parsed.prompt_file))
        except OSError as error:
            raise BadInput(f"{name} must be a file that can be read, got {parsed.prompt_file}: {error.strerror}"
                           ) from None
        except UnicodeDecodeError as error:
            raise BadInput(f"{name} must be UTF-8 text, got {parsed.prompt_file}: {error.reason} at byte {error.start}"
                           ) from None
    if text == "":
        raise BadInput(f"{name} must not be empty, got {'an empty file' if parsed.prompt_file else repr(text)}")
    return DEFAULT_PROMPT if text is None else text


def _read(path: Path) -> str | Path:
    """Return a file's text, or its path if it is long: then it is only checked. Raises UnicodeDecodeError."""
    with open(path, "rb") as file:
        content = file.read(BLOCK)
        if len(content) < BLOCK:
            return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8").read()
        decoder, done = codecs.getincrementaldecoder("utf-8")(), 0
        while content:
            waiting = len(decoder.getstate()[0])
            try:
                decoder.decode(content)
            except UnicodeDecodeError as error:
                error.start += done - waiting
                raise
            done += len(content)
            content = file.read(BLOCK)
        waiting = len(decoder.getstate()[0])
        if waiting:
            raise UnicodeDecodeError("utf-8", b"", done - waiting, done, "unexpected end of data")
    return path
