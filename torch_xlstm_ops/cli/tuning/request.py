"""The request of `xlstm-ops tune`, checked before anything is measured."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from torch_xlstm_ops import config, schedules
from torch_xlstm_ops.cli.shared.errors import BadInput, bad_input
from torch_xlstm_ops.cli.shared.loading import DTYPES, check_directory
from torch_xlstm_ops.cli.shared.options import COUNT, Option, one_of, parse
from torch_xlstm_ops.config import Kind, Schedule, tuned_plans
from torch_xlstm_ops.models import DEMO_MODEL
from torch_xlstm_ops.runtime import devices
from torch_xlstm_ops.runtime.devices import energy
from torch_xlstm_ops.tune.objective import Objective

METHODS = ("random", "ga", "tpe", "bandit", "boltzmann", "grid")
OP_PHASES, MODEL_PHASES = ("prefill", "train"), ("decode", "first-token")
PHASES = (*OP_PHASES, *MODEL_PHASES)


def _read_phases(text: str) -> dict[str, float]:
    """Read ``prefill`` or ``prefill=0.7,decode=0.3``."""
    pairs = [part.partition("=") for part in text.split(",")]
    found = {name: float(weight) if sign else 1.0 for name, sign, weight in pairs}
    if len(found) != len(pairs):
        raise ValueError(text)
    return found


def _read_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


_SECONDS = Kind("a number above 0", float, lambda v: isinstance(v, float) and 0 < v < float("inf"))
_TRIALS = Kind("a whole number of at least 2", int, lambda v: type(v) is int and v >= 2)
_PHASES = Kind(
    f"among {', '.join(PHASES)}, each once, with weights above 0 as in prefill=0.7,decode=0.3", _read_phases,
    lambda v: isinstance(v, dict) and all(name in PHASES and 0 < w < float("inf") for name, w in v.items()),
)
_LENGTHS = Kind("whole numbers of at least 1, with commas", _read_numbers,
                lambda v: isinstance(v, tuple) and bool(v) and all(n >= 1 for n in v))
_SHAPE = Kind("four whole numbers of at least 1: B,NH,DHQK,DHHV", _read_numbers,
              lambda v: isinstance(v, tuple) and len(v) == 4 and all(n >= 1 for n in v))
_SCHEDULES = Kind("among inductor, queued, ray, with commas", lambda text: tuple(map(Schedule, text.split(","))),
                  lambda v: isinstance(v, tuple) and not {Schedule.AUTO, Schedule.RECURRENT} & set(v))

OPTIONS = (
    Option("method", one_of(*METHODS), "NAME", "tpe", ", ".join(METHODS)),
    Option("trials", _TRIALS, "COUNT", 40, "plans to measure, the default among them"),
    Option("time_budget", _SECONDS, "SECONDS", None, "for each length: begin no trial later"),
    Option("trial_seconds", _SECONDS, "SECONDS", 3.0, "for timing one plan"),
    Option("seed", COUNT, "SEED", 0, "of the search"),
    Option("phase", _PHASES, "PHASES", {"prefill": 1.0}, "what to be fast at: prefill, train, decode, first-token, "
           "or a blend such as prefill=0.7,decode=0.3; default prefill"),
    Option("lengths", _LENGTHS, "TOKENS", (2048, 16384, 32768), "one search each, default 2048,16384,32768"),
    Option("shape", _SHAPE, "B,NH,DHQK,DHHV", None, "of the operator's calls (default the model's, for one prompt)"),
    Option("device", one_of("auto", *devices.KINDS), "NAME", "auto", "auto, cpu, cuda or mps"),
    Option("dtype", one_of("auto", *DTYPES), "NAME", "auto", "auto is float32 on the CPU and bfloat16 elsewhere"),
    Option("objective", one_of(*Objective), "NAME", "time", "what the best plan has least of: time, energy, or their "
           "product"),
    Option("schedules", _SCHEDULES, "NAMES", (Schedule.INDUCTOR, Schedule.QUEUED),
           "to choose among, default inductor,queued"),
)


class TuneRequest(NamedTuple):
    """The checked arguments of a search or an ablation."""

    model: Path
    out: Path
    resume: bool
    tuned: Path | None  # the file that receives the winner
    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, int, int, int]  # B NH DHQK DHHV
    values: dict[str, Any]  # by `Option.name`

    @property
    def needs_model(self) -> bool:
        """Return whether a phase runs the model."""
        return any(phase in MODEL_PHASES for phase in self.values["phase"])


def read(parsed: argparse.Namespace) -> TuneRequest:
    """Check everything that can be checked before anything is measured."""
    values: dict[str, Any] = {option.name: parse(option, getattr(parsed, option.name)) for option in OPTIONS}
    model = Path(parsed.model) if parsed.model is not None else DEMO_MODEL
    out = Path(parsed.out)
    if out.exists() and not out.is_dir():
        raise BadInput(f"--out must be a folder, got {out}, which is a file")
    with bad_input():
        device = devices.resolve_device(values["device"])
    uncounted = None if values["objective"] == Objective.TIME else energy.missing(device)
    if uncounted is not None:
        raise BadInput(f"--objective must be time where energy is not counted, got {values['objective']}: {uncounted}")
    for schedule in values["schedules"]:
        reason = schedules.unavailable(schedule, device)
        if reason is not None:
            raise BadInput(f"--schedules must be ones that can run on {device.type}, got {schedule}: {reason}")
    phases = values["phase"]
    if values["shape"] is not None and any(phase in MODEL_PHASES for phase in phases):
        raise BadInput(f"--shape must come without the phases of a model, got {', '.join(phases)}")
    automatic = torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype = DTYPES.get(values["dtype"], automatic)
    tuned = None if parsed.no_apply else tuned_plans.place(config.current().tuned)
    shape = values["shape"] or _shape_of(model)
    return TuneRequest(model, out, parsed.resume, tuned, device, dtype, shape, values)


def _shape_of(model: Path) -> tuple[int, int, int, int]:
    """Return the sizes of one prompt's call in a model."""
    check_directory(model)
    try:
        settings = json.loads((model / "config.json").read_text(encoding="utf-8"))
        NH, width = int(settings["num_heads"]), int(settings["hidden_size"])
        return 1, NH, int(width * settings["qk_dim_factor"]) // NH, int(width * settings["v_dim_factor"]) // NH
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"--model must be a directory of a Hugging Face xLSTM, got {model}: {type(error).__name__}: "
                       f"{error}") from None
