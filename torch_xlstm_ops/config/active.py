"""The configuration in force: loaded at the first use, and overridden in the current context by `use`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import NamedTuple

from torch_xlstm_ops.config import layers
from torch_xlstm_ops.config.layers import Source, Values
from torch_xlstm_ops.config.settings import SETTINGS, SLSTM_SCHEDULE, Config, Schedule, SLSTMSchedule, check, setting
from torch_xlstm_ops.runtime import forks
from torch_xlstm_ops.runtime.state import on_reset


class _Layer(NamedTuple):
    config: Config
    sources: Mapping[str, Source]


def _stack(*layers: Values) -> _Layer:
    """Merge layers; a later one overrides those before it."""
    merged: dict[str, Source] = {}
    for layer in layers:
        merged.update(layer)
    return _Layer(Config(**{field: s.value for field, s in merged.items()}), merged)  # type: ignore[arg-type]


_base: _Layer | None = None  # all sources below `use`; None until the first use
_flags: Mapping[str, str] = {}
_lock = forks.new_rlock()
_listeners: list[Callable[[Config], None]] = []
_scoped: ContextVar[_Layer | None] = ContextVar("xlstm_ops_config", default=None)


def _load() -> _Layer:
    global _base
    with _lock:
        if _base is None:
            path = os.environ.get(layers.FILE_VARIABLE)
            layer = _stack(
                layers.defaults(), layers.from_file(path) if path is not None else {},
                layers.from_environment(os.environ), layers.from_flags(_flags),
            )
            for listener in _listeners:
                listener(layer.config)  # if one raises, nothing is loaded: the next use raises again
            _base = layer
        return _base


def current() -> Config:
    """Return the configuration in force in this context. Cheap enough for each operator call.

    Other threads do not see what `use` set in this one: a schedule reads the configuration once, in the caller's
    thread, and passes its plan to its workers and its backward.
    """
    return (_scoped.get() or _base or _load()).config


def sources() -> Mapping[str, Source]:
    """Return the value in force and its origin for each field."""
    return dict((_scoped.get() or _base or _load()).sources)


def for_call(*, schedule: Schedule | str | None = None, chunk_size: int | None = None) -> Config:
    """Return the configuration overridden by a call's arguments.

    schedule: a `Schedule` or its name; None keeps the configured one.
    chunk_size: tokens a chunk; None keeps the configured one.

    Raises ValueError for an unknown schedule or a chunk size below 1.
    """
    config = current()
    if schedule is None and chunk_size is None:
        return config
    return _over(config, schedule, chunk_size)


def slstm_schedule(schedule: str | None) -> SLSTMSchedule:
    """Return the sLSTM schedule of a call; None for the configured one. Raises ValueError for an unknown name."""
    if schedule is None:
        return current().slstm_schedule
    return check(SLSTM_SCHEDULE, schedule, "schedule", text=False)  # type: ignore[return-value]


def cuda_graphs() -> bool:
    """Return whether calls may be replayed as CUDA graphs."""
    return current().cuda_graphs == "on"


@lru_cache(maxsize=1024, typed=True)  # typed: True equals 1, but is not a chunk size
def _over(config: Config, schedule: str | None, chunk_size: int | None) -> Config:
    asked = {"schedule": schedule, "chunk_size": chunk_size}
    values = {f: check(SETTINGS[f].kind, v, f, text=False) for f, v in asked.items() if v is not None}
    return dataclasses.replace(config, **values)  # type: ignore[arg-type]


@contextmanager
def use(**fields: object) -> Iterator[Config]:
    """Override fields of the configuration inside a ``with`` block; None means a field's default.

    Holds in the current context (thread or task) only.

    Raises ValueError for a field that does not exist, for a bad value, and for `trace`, which belongs to the whole
    process: call `trace.record` instead.
    """
    outer = _scoped.get() or _base or _load()
    unset, layer = layers.defaults(), {}
    for field, value in fields.items():
        row = setting(field, "a field of config.use", field)
        if field == "trace":
            raise ValueError("a field of config.use must not be trace, which is process-wide: use trace.record(FILE)")
        checked = unset[field].value if value is None else check(row.kind, value, field, text=False)
        layer[field] = Source(checked, "config.use")
    token = _scoped.set(_stack(outer.sources, layer))
    try:
        yield current()
    finally:
        _scoped.reset(token)


def reload(flags: Mapping[str, str] | None = None) -> Config:
    """Read the environment and the TOML file again, and return the configuration.

    flags: text of command-line flags by field, kept until flags are given again; None keeps the earlier ones.
    """
    global _base, _flags
    if flags is not None:
        for field in flags:
            setting(field, "a flag", field)
        _flags = dict(flags)
    _base = None
    return _load().config


def on_load(listener: Callable[[Config], None]) -> None:
    """Call `listener` with the process-wide configuration whenever it is loaded, and now if it is."""
    with _lock:
        _listeners.append(listener)
        if _base is not None:
            listener(_base.config)


@on_reset
def _unload() -> None:
    global _base, _flags
    _base, _flags = None, {}
    _over.cache_clear()
