"""The settings: the frozen `Config`, the kinds of values, and the one table, its flags and its Markdown."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import argparse

PREFIX = "XLSTM_OPS_"


class _Name(str, Enum):
    """A value that is written as its name."""

    def __str__(self) -> str:
        return str(self.value)


class Schedule(_Name):
    """How a sequence's segments are executed.

    auto: the tuned choice, else inductor. inductor: one compiled call after another. queued: a bounded task queue
    over bands and segments. ray: the same tasks on Ray actors. recurrent: the compiled step, token by token.
    """

    AUTO = "auto"
    INDUCTOR = "inductor"
    QUEUED = "queued"
    RAY = "ray"
    RECURRENT = "recurrent"


class SLSTMSchedule(_Name):
    """How an sLSTM sequence is executed.

    auto: parallel on CUDA from 512 tokens on, where its kernels are compiled already, else sequential. sequential:
    compiled steps, one after another. parallel: all tokens at once, in rounds that end when the result is the
    sequential one within the dtype's tolerance.
    """

    AUTO = "auto"
    SEQUENTIAL = "sequential"
    PARALLEL = "parallel"


class Tune(_Name):
    """Whether plans are tuned while the operators are used.

    off: no. online: by the policy that loses least time in `benchmarks.online`. ucb, thompson, boltzmann, cfc: by one
    of the policies, for comparison.
    """

    OFF = "off"
    ONLINE = "online"
    UCB = "ucb"
    THOMPSON = "thompson"
    BOLTZMANN = "boltzmann"
    CFC = "cfc"


@dataclasses.dataclass(frozen=True)
class Config:
    """Values of all settings; None leaves the choice to the plan."""

    schedule: Schedule = Schedule.AUTO
    chunk_size: int | None = None
    segment: int | None = None
    heads_per_band: int | None = None
    workers: int | None = None
    streams: int | None = None
    window: int | None = None
    trace: str | None = None
    mem_fraction: float | None = None
    ray_address: str | None = None
    tuned: str = "on"
    slstm_schedule: SLSTMSchedule = SLSTMSchedule.AUTO
    kernels: str = "on"
    cuda_graphs: str = "on"
    tune: Tune = Tune.OFF


class Kind(NamedTuple):
    """A kind of value: its description in errors, its parser, and its test."""

    expects: str
    read: Callable[[str], object]
    accepts: Callable[[object], bool]
    textual: bool = False  # parse a str from code or TOML too


class Setting(NamedTuple):
    """One row of the table from which variables, flags, TOML keys, and documents are made."""

    field: str
    kind: Kind
    metavar: str
    help: str
    aliases: tuple[str, ...] = ()

    @property
    def variable(self) -> str:
        """Return the environment variable's name."""
        return PREFIX + self.field.upper()

    @property
    def flag(self) -> str:
        """Return the command-line flag."""
        return "--" + self.field.replace("_", "-")


# Names of schedules in the packages that this one replaces.
_FORMER_SCHEDULES = {
    "queued_compiled_steps": "queued",
    "ray_compiled_steps": "ray",
    "native_compiled_autograd": "inductor",
}


def _read_schedule(text: str) -> Schedule:
    name = text.removeprefix("chunkwise--")
    return Schedule(_FORMER_SCHEDULES.get(name, name))


def _is_address(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(host) and port.isdecimal()


TRACE_SUFFIXES = (".csv", ".jsonl", ".json")

WHOLE = Kind("a whole number of at least 1", int, lambda v: type(v) is int and v >= 1)
FRACTION = Kind("a number above 0 and at most 1", float, lambda v: type(v) in (int, float) and 0 < v <= 1)  # type: ignore[operator]
SCHEDULE = Kind(
    "one of " + ", ".join(Schedule), _read_schedule, lambda v: isinstance(v, Schedule), textual=True
)
SLSTM_SCHEDULE = Kind(
    "one of " + ", ".join(SLSTMSchedule), SLSTMSchedule, lambda v: isinstance(v, SLSTMSchedule), textual=True
)
TRACE_FILE = Kind(
    "a file name ending in .csv, .jsonl or .json",
    str,
    lambda v: isinstance(v, str) and os.path.splitext(v)[1] in TRACE_SUFFIXES,
    textual=True,
)
TUNED = Kind("on, off, or a file name ending in .json", str,
             lambda v: isinstance(v, str) and (v in ("on", "off") or v.endswith(".json")), textual=True)
KERNELS = Kind("on, off, or the path of a folder", str,
               lambda v: isinstance(v, str) and (v in ("on", "off") or os.path.dirname(v) != ""), textual=True)
ON_OFF = Kind("on or off", str, lambda v: v in ("on", "off"), textual=True)
TUNE = Kind("one of " + ", ".join(Tune), Tune, lambda v: isinstance(v, Tune), textual=True)
ADDRESS = Kind("auto or HOST:PORT", str, lambda v: isinstance(v, str) and (v == "auto" or _is_address(v)), textual=True)

SETTINGS: Mapping[str, Setting] = {
    row.field: row
    for row in (
        Setting("schedule", SCHEDULE, "NAME", "how segments are executed", ("XLSTM_CHUNKWISE_BACKEND",)),
        Setting("chunk_size", WHOLE, "TOKENS", "tokens a chunk"),
        Setting("segment", WHOLE, "TOKENS", "tokens a segment, one compiled call each"),
        Setting("heads_per_band", WHOLE, "HEADS", "heads computed together, as one band",
                ("XLSTM_MPS_HEADS_PER_BAND",)),
        Setting("workers", WHOLE, "COUNT", "worker threads of the queued schedule, or Ray actors",
                ("XLSTM_MPS_WORKERS",)),
        Setting("streams", WHOLE, "COUNT", "device streams of the queued schedule", ("XLSTM_MPS_STREAMS",)),
        Setting("window", WHOLE, "TASKS", "most tasks in flight at once"),
        Setting("trace", TRACE_FILE, "FILE", "record timings (.json opens in Perfetto)"),
        Setting("mem_fraction", FRACTION, "FRACTION", "most of the device's memory that a plan may use",
                ("XLSTM_MEM_SOFT_PCT", "XLSTM_MEM_HARD_PCT")),
        Setting("ray_address", ADDRESS, "ADDRESS", "the Ray cluster to attach to, instead of starting Ray here"),
        Setting("tuned", TUNED, "FILE", "whether auto uses what `xlstm-ops tune` found, and where that is kept"),
        Setting("slstm_schedule", SLSTM_SCHEDULE, "NAME", "how an sLSTM sequence is executed"),
        Setting("kernels", KERNELS, "FOLDER", "whether compiled kernels are kept for later processes, and where"),
        Setting("cuda_graphs", ON_OFF, "on|off", "whether small calls that come often on CUDA are replayed as graphs"),
        Setting("tune", TUNE, "NAME", "whether auto also tries other plans while it is used, and how it chooses"),
    )
}


def check(kind: Kind, value: object, where: str, *, text: bool) -> object:
    """Return `value` as a value of a kind; raise ValueError with where it was given, what must be, and what was found.

    text: whether to parse a str, as one from a variable or a flag.
    """
    found = value
    if isinstance(value, str) and (text or kind.textual):
        try:
            value = kind.read(value)
        except ValueError:
            value = None
    if value is None or not kind.accepts(value):
        raise ValueError(f"{where} must be {kind.expects}, got {found!r}")
    return value


def setting(field: str, where: str, origin: str) -> Setting:
    """Return a row of the table; raise ValueError for an unknown field, named as `where` and `origin` say."""
    if field not in SETTINGS:
        raise ValueError(f"{where} must be one of {', '.join(SETTINGS)}, got {origin}")
    return SETTINGS[field]


def markdown() -> str:
    """Return the table of settings for the documents."""
    rows = ["| environment | flag | TOML key | value | meaning | also read |", "|---|---|---|---|---|---|"]
    for setting in SETTINGS.values():
        also = ", ".join(f"`{name}`" for name in setting.aliases)
        rows.append(f"| `{setting.variable}` | `{setting.flag}` | `{setting.field}` | {setting.kind.expects} "
                    f"| {setting.help} | {also} |")
    return "\n".join(rows)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each setting to `parser`; `reload` checks the text, with the same errors as for other sources."""
    group = parser.add_argument_group("schedule")
    for setting in SETTINGS.values():
        group.add_argument(setting.flag, dest=setting.field, metavar=setting.metavar,
                           help=f"{setting.help}: {setting.kind.expects}")


def given_flags(parsed: argparse.Namespace) -> dict[str, str]:
    """Return the text of the flags of `add_flags` that the user gave, by field, for `reload`."""
    return {field: text for field in SETTINGS if (text := getattr(parsed, field)) is not None}
