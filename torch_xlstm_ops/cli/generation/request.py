"""The request of `xlstm-ops generate`, checked before a model is loaded or a file is written."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch

from torch_xlstm_ops import config, schedules
from torch_xlstm_ops.cli.generation.prompt_text import prompt_text
from torch_xlstm_ops.cli.shared.errors import BadInput, bad_input
from torch_xlstm_ops.cli.shared.loading import DTYPES, check_directory
from torch_xlstm_ops.cli.shared.options import COUNT, Option, one_of, parse
from torch_xlstm_ops.config import FRACTION, WHOLE, Kind
from torch_xlstm_ops.models import DEMO_MODEL
from torch_xlstm_ops.runtime import devices, files

_TEMPERATURE = Kind("a number of at least 0", float, lambda v: isinstance(v, float) and 0 <= v < float("inf"))
_STATS_FILE = Kind("a file name ending in .csv or .json", str, lambda v: str(v).endswith((".csv", ".json")))

OPTIONS = (
    Option("max_new_tokens", WHOLE, "COUNT", 200, "most tokens to write"),
    Option("temperature", _TEMPERATURE, "T", 0.0, "0 always takes the most likely token"),
    Option("top_k", WHOLE, "COUNT", None, "sample among this many most likely tokens"),
    Option("top_p", FRACTION, "P", None, "sample among the most likely tokens that reach this probability"),
    Option("seed", COUNT, "SEED", 0, "of the sampling"),
    Option("device", one_of("auto", *devices.KINDS), "NAME", "auto", "auto, cpu, cuda or mps"),
    Option("dtype", one_of("auto", *DTYPES), "NAME", "auto", "auto is the checkpoint's, and float32 on the CPU"),
    Option("stats_log", _STATS_FILE, "FILE", None, "write timings of prefill and decode: .csv or .json"),
    Option("prefill_workers", WHOLE, "COUNT", None, "read the prompt by this many Ray actors, each a part of it"),
    Option("worker_gpus", FRACTION, "GPUS", None, "part of a GPU for each of these, of its memory too (default 1)"),
    Option("stats_every", WHOLE, "TOKENS", None, "tokens between two lines of the log (default 16)"),
)


class GenerateRequest(NamedTuple):
    """The checked arguments of `generate`."""

    model: Path
    prompt: str | Path  # the path of a text longer than `tokens.TEXT_BLOCK`
    pool: str | None
    resume: str | None
    stops: tuple[str, ...]
    patched: bool
    device: torch.device
    quiet: bool  # write the text only
    values: dict[str, Any]  # by `Option.name`


def read(parsed: argparse.Namespace) -> GenerateRequest:
    """Check everything that can be checked before a model is loaded."""
    values: dict[str, Any] = {option.name: parse(option, getattr(parsed, option.name)) for option in OPTIONS}
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
    elif values["worker_gpus"] is not None:
        raise BadInput(f"--worker-gpus must come with --prefill-workers, got {values['worker_gpus']:g} without")
    if parsed.pool is not None and Path(parsed.pool).exists() and not Path(parsed.pool).is_dir():
        raise BadInput(f"--pool must be a folder, or one to be made, got {parsed.pool}, which is a file")
    model = Path(parsed.model) if parsed.model is not None else DEMO_MODEL
    check_directory(model)
    prompt = prompt_text(parsed)
    with bad_input():
        if values["stats_log"] is not None:
            files.check_file("--stats-log", values["stats_log"])
        if parsed.resume is not None:
            files.check_file("--resume", parsed.resume)
        device = devices.resolve_device(values["device"])
        schedule = config.reload(flags=flags).schedule
        reason = None if parsed.no_patch else schedules.unavailable(schedule, device)
    if reason is not None:
        raise BadInput(f"schedule must be one that can run on {device.type}, got {schedule}: {reason}")
    return GenerateRequest(model, prompt, parsed.pool, parsed.resume, tuple(parsed.stop), not parsed.no_patch, device,
                   parsed.quiet, values)


def _check_prefill_workers(parsed: argparse.Namespace) -> None:
    given = {"--no-patch": parsed.no_patch, "--pool": parsed.pool is not None, "--resume": parsed.resume is not None}
    if clashing := [flag for flag, is_given in given.items() if is_given]:
        raise BadInput(f"--prefill-workers must come without {', '.join(given)}, got {', '.join(clashing)}")
