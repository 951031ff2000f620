"""The one configuration: a frozen `Config`, the table of its settings, and where each value came from.

One order everywhere, the first that speaks wins:

    call argument > `config.use` > command-line flag > environment > TOML file > tuned > default

The environment, and the TOML file that ``XLSTM_OPS_CONFIG`` names, are read once, at the first use; `reload` reads
them again. A name nobody knows and a value nobody can use are errors that say where they stand.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum
from functools import lru_cache
from types import ModuleType
from typing import NamedTuple

PREFIX = "XLSTM_OPS_"
FILE_VARIABLE = "XLSTM_OPS_CONFIG"
PATCH_VARIABLE = "XLSTM_OPS_PATCH"  # read by `torch_xlstm_ops.patch.on_import`


class Schedule(str, Enum):
    """How a sequence's segments are put on the device.

    auto: the tuned choice, else inductor. inductor: one compiled call after another. queued: a bounded task queue
    over bands and segments. ray: the same tasks on Ray actors. recurrent: the compiled step, token by token.
    """

    AUTO = "auto"
    INDUCTOR = "inductor"
    QUEUED = "queued"
    RAY = "ray"
    RECURRENT = "recurrent"

    def __str__(self) -> str:
        return str(self.value)


@dataclasses.dataclass(frozen=True)
class Config:
    """What the user asked for; None leaves the choice to the plan."""

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


class Kind(NamedTuple):
    """A sort of value: what to tell the user it must be, how to read it from text, and the test it must pass."""

    expects: str
    read: Callable[[str], object]
    accepts: Callable[[object], bool]
    textual: bool = False  # a str in code or TOML is read as text too


class Setting(NamedTuple):
    """One row of the table that drives variables, flags, TOML keys, and the README."""

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


class Source(NamedTuple):
    """A setting's value and the place it came from."""

    value: object
    origin: str


# The ancestor's names for what the schedules replace.
_ANCESTOR_SCHEDULES = {
    "queued_compiled_steps": "queued",
    "ray_compiled_steps": "ray",
    "native_compiled_autograd": "inductor",
}


def _read_schedule(text: str) -> Schedule:
    name = text.removeprefix("chunkwise--")
    return Schedule(_ANCESTOR_SCHEDULES.get(name, name))


def _is_address(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(host) and port.isdecimal()


TRACE_SUFFIXES = (".csv", ".jsonl", ".json")

WHOLE = Kind("a whole number of at least 1", int, lambda v: type(v) is int and v >= 1)
FRACTION = Kind("a number above 0 and at most 1", float, lambda v: type(v) in (int, float) and 0 < v <= 1)  # type: ignore[operator]
SCHEDULE = Kind(
    "one of " + ", ".join(Schedule), _read_schedule, lambda v: isinstance(v, Schedule), textual=True
)
TRACE_FILE = Kind(
    "a file name ending in .csv, .jsonl or .json",
    str,
    lambda v: isinstance(v, str) and os.path.splitext(v)[1] in TRACE_SUFFIXES,
    textual=True,
)
TUNED = Kind("on, off, or a file name ending in .json", str,
             lambda v: isinstance(v, str) and (v in ("on", "off") or v.endswith(".json")), textual=True)
ADDRESS = Kind("auto or HOST:PORT", str, lambda v: isinstance(v, str) and (v == "auto" or _is_address(v)), textual=True)

SETTINGS: Mapping[str, Setting] = {
    row.field: row
    for row in (
        Setting("schedule", SCHEDULE, "NAME", "how segments are put on the device", ("XLSTM_CHUNKWISE_BACKEND",)),
        Setting("chunk_size", WHOLE, "TOKENS", "tokens a chunk"),
        Setting("segment", WHOLE, "TOKENS", "tokens a segment, one compiled call each"),
        Setting("heads_per_band", WHOLE, "HEADS", "heads that travel together as one band",
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
    )
}


def check(kind: Kind, value: object, where: str, *, text: bool) -> object:
    """Return `value` as `kind` has it; a ValueError says where it stands, what was expected, and what was found.

    text: whether a str is to be read as text, as from a variable or a flag.
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


def _setting(field: str, where: str, origin: str) -> Setting:
    if field not in SETTINGS:
        raise ValueError(f"{where} must be one of {', '.join(SETTINGS)}, got {origin}")
    return SETTINGS[field]


class _Layer(NamedTuple):
    config: Config
    sources: Mapping[str, Source]


_Values = Mapping[str, Source]


def _stack(*layers: _Values) -> _Layer:
    """Merge layers, later ones on top."""
    merged: dict[str, Source] = {}
    for layer in layers:
        merged.update(layer)
    return _Layer(Config(**{field: s.value for field, s in merged.items()}), merged)  # type: ignore[arg-type]


def _defaults() -> _Values:
    return {field.name: Source(field.default, "default") for field in dataclasses.fields(Config)}


def _from_environment(environ: Mapping[str, str]) -> _Values:
    known = {setting.variable for setting in SETTINGS.values()} | {FILE_VARIABLE, PATCH_VARIABLE}
    for name in sorted(environ):
        if name.startswith(PREFIX) and name not in known:
            raise ValueError(f"an {PREFIX}* variable must be one of {', '.join(sorted(known))}, got {name}")
    found: dict[str, Source] = {}
    for field, setting in SETTINGS.items():
        source = _read_variable(setting, setting.variable, environ) or _read_aliases(setting, environ)
        if source is not None:
            found[field] = source
    return found


def _read_variable(setting: Setting, name: str, environ: Mapping[str, str]) -> Source | None:
    if name not in environ:
        return None
    where = f"environment variable {name}"
    return Source(check(setting.kind, environ[name], where, text=True), where)


def _read_aliases(setting: Setting, environ: Mapping[str, str]) -> Source | None:
    found = [s for s in (_read_variable(setting, name, environ) for name in setting.aliases) if s is not None]
    if any(source.value != found[0].value for source in found):
        raise ValueError(f"{' and '.join(setting.aliases)} must agree, as both mean {setting.variable}, got "
                         f"{' and '.join(str(s.value) for s in found)}")
    return found[0] if found else None


def _from_file(path: str) -> _Values:
    where = f"{FILE_VARIABLE} = {path}"
    toml = _toml(where)
    try:
        with open(path, "rb") as file:
            table = toml.load(file)
    except OSError as error:
        raise ValueError(f"{where} must be a readable TOML file, got {error.strerror}") from None
    except toml.TOMLDecodeError as error:
        raise ValueError(f"{where} must be a TOML file, got: {error}") from None
    found: dict[str, Source] = {}
    for key, value in table.items():
        setting = _setting(key, f"a key in {path}", key)
        found[key] = Source(check(setting.kind, value, f"{key} in {path}", text=False), f"file {path}")
    return found


def _toml(where: str) -> ModuleType:
    for name in ("tomllib", "tomli"):  # the standard library has one from Python 3.11
        if importlib.util.find_spec(name) is not None:
            return importlib.import_module(name)
    raise RuntimeError(f"{where} needs Python 3.11 or newer, or the package tomli: pip install tomli")


_base: _Layer | None = None  # everything below `use`; None until first read
_flags: Mapping[str, str] = {}
_lock = threading.RLock()
_listeners: list[Callable[[Config], None]] = []
_scoped: ContextVar[_Layer | None] = ContextVar("xlstm_ops_config", default=None)


def _load() -> _Layer:
    global _base
    with _lock:
        if _base is None:
            path = os.environ.get(FILE_VARIABLE)
            layer = _stack(
                _defaults(),
                _from_file(path) if path is not None else {},
                _from_environment(os.environ),
                {f: Source(check(SETTINGS[f].kind, text, SETTINGS[f].flag, text=True), f"flag {SETTINGS[f].flag}")
                 for f, text in _flags.items()},
            )
            for listener in _listeners:
                listener(layer.config)  # one that raises leaves nothing loaded: the next use raises again
            _base = layer
        return _base


def current() -> Config:
    """Return the configuration in force in this context. Cheap enough to read on each op call.

    `use` is bound to the calling thread's context: a schedule reads it once, where the op is called, and hands its
    plan to its workers and its backward.
    """
    return (_scoped.get() or _base or _load()).config


def sources() -> Mapping[str, Source]:
    """Return, for each field, the value in force and where it came from."""
    return dict((_scoped.get() or _base or _load()).sources)


def for_call(*, schedule: Schedule | str | None = None, chunk_size: int | None = None) -> Config:
    """Return the configuration with a call's own arguments on top.

    schedule: a `Schedule` or its name; None keeps the configured one.
    chunk_size: tokens a chunk; None keeps the configured one.

    Raises ValueError for an unknown schedule or a chunk size below 1.
    """
    config = current()
    if schedule is None and chunk_size is None:
        return config
    return _over(config, schedule, chunk_size)


@lru_cache(maxsize=1024, typed=True)  # typed: True is no chunk size, though it equals 1
def _over(config: Config, schedule: str | None, chunk_size: int | None) -> Config:
    asked = {"schedule": schedule, "chunk_size": chunk_size}
    values = {f: check(SETTINGS[f].kind, v, f, text=False) for f, v in asked.items() if v is not None}
    return dataclasses.replace(config, **values)  # type: ignore[arg-type]


@contextmanager
def use(**fields: object) -> Iterator[Config]:
    """Put fields of `Config` on top of the configuration inside a ``with`` block; None restores a field's default.

    Bound to the current context (thread or task), so blocks in other threads do not meet.

    Raises ValueError for a field that does not exist, for a bad value, and for `trace`, which belongs to the whole
    process: call `trace.record` instead.
    """
    outer = _scoped.get() or _base or _load()
    defaults, layer = _defaults(), {}
    for field, value in fields.items():
        setting = _setting(field, "a field of config.use", field)
        if field == "trace":
            raise ValueError("a field of config.use must not be trace, which is process-wide: use trace.record(FILE)")
        checked = defaults[field].value if value is None else check(setting.kind, value, field, text=False)
        layer[field] = Source(checked, "config.use")
    token = _scoped.set(_stack(outer.sources, layer))
    try:
        yield current()
    finally:
        _scoped.reset(token)


def reload(flags: Mapping[str, str] | None = None) -> Config:
    """Read the environment and the file again, and return the result.

    flags: text of command-line flags by field, which stay on top until given again; None keeps the earlier ones.
    """
    global _base, _flags
    if flags is not None:
        for field in flags:
            _setting(field, "a flag", field)
        _flags = dict(flags)
    _base = None
    return _load().config


def on_load(listener: Callable[[Config], None]) -> None:
    """Call `listener` with the process-wide configuration whenever it is read, and now if it has been."""
    with _lock:
        _listeners.append(listener)
        if _base is not None:
            listener(_base.config)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the table's flags; their text is checked by `reload`, so that errors read alike everywhere."""
    group = parser.add_argument_group("schedule")
    for setting in SETTINGS.values():
        group.add_argument(setting.flag, dest=setting.field, metavar=setting.metavar,
                           help=f"{setting.help}: {setting.kind.expects}")


def given_flags(parsed: argparse.Namespace) -> dict[str, str]:
    """Return the text of those flags of `add_flags` that the user gave, for `reload`."""
    return {field: text for field in SETTINGS if (text := getattr(parsed, field)) is not None}


def markdown() -> str:
    """Return the table of settings as the README shows it."""
    rows = ["| environment | flag | TOML key | value | meaning | also read |", "|---|---|---|---|---|---|"]
    for setting in SETTINGS.values():
        also = ", ".join(f"`{name}`" for name in setting.aliases)
        rows.append(f"| `{setting.variable}` | `{setting.flag}` | `{setting.field}` | {setting.kind.expects} "
                    f"| {setting.help} | {also} |")
    return "\n".join(rows)
