"""Read settings from defaults, the TOML file, the environment and flags, each with its origin."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping
from types import ModuleType
from typing import NamedTuple

from torch_xlstm_ops.config.settings import PREFIX, SETTINGS, Config, Setting, check, setting
from torch_xlstm_ops.runtime import bounded_read

FILE_VARIABLE = "XLSTM_OPS_CONFIG"
MAX_BYTES = 1 << 20  # of a TOML file
PATCH_VARIABLE = "XLSTM_OPS_PATCH"  # read by `torch_xlstm_ops.patch.on_import`


class Source(NamedTuple):
    """A setting's value and its origin."""

    value: object
    origin: str


Values = Mapping[str, Source]  # by field


def defaults() -> Values:
    """Return every setting's default."""
    return {field.name: Source(field.default, "default") for field in dataclasses.fields(Config)}


def from_environment(environ: Mapping[str, str]) -> Values:
    """Return the settings that environment variables set. Raises ValueError for an unknown name or a bad value."""
    known = {row.variable for row in SETTINGS.values()} | {FILE_VARIABLE, PATCH_VARIABLE}
    for name in sorted(environ):
        if name.startswith(PREFIX) and name not in known:
            raise ValueError(f"an {PREFIX}* variable must be one of {', '.join(sorted(known))}, got {name}")
    found: dict[str, Source] = {}
    for field, row in SETTINGS.items():
        source = _read_variable(row, row.variable, environ) or _read_aliases(row, environ)
        if source is not None:
            found[field] = source
    return found


def _read_variable(row: Setting, name: str, environ: Mapping[str, str]) -> Source | None:
    if name not in environ:
        return None
    where = f"environment variable {name}"
    return Source(check(row.kind, environ[name], where, text=True), where)


def _read_aliases(row: Setting, environ: Mapping[str, str]) -> Source | None:
    found = [s for s in (_read_variable(row, name, environ) for name in row.aliases) if s is not None]
    if any(source.value != found[0].value for source in found):
        raise ValueError(f"{' and '.join(row.aliases)} must agree, as both mean {row.variable}, got "
                         f"{' and '.join(str(s.value) for s in found)}")
    return found[0] if found else None


def from_file(path: str) -> Values:
    """Return the settings of a TOML file. Raises ValueError for an unreadable file, an unknown key or a bad value."""
    where = f"{FILE_VARIABLE} = {path}"
    toml = _toml(where)
    try:
        table = toml.loads(bounded_read.read_bytes(path, MAX_BYTES).decode("utf-8"))
    except OSError as error:
        raise ValueError(f"{where} must be a readable TOML file, got {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # a bad kind or size of file, bad UTF-8, bad TOML
        raise ValueError(f"{where} must be a TOML file, got: {error}") from None
    found: dict[str, Source] = {}
    for key, value in table.items():
        row = setting(key, f"a key in {path}", key)
        found[key] = Source(check(row.kind, value, f"{key} in {path}", text=False), f"file {path}")
    return found


def _toml(where: str) -> ModuleType:
    for name in ("tomllib", "tomli"):  # the standard library has one from Python 3.11
        if importlib.util.find_spec(name) is not None:
            return importlib.import_module(name)
    raise RuntimeError(f"{where} needs Python 3.11 or newer, or the package tomli: pip install tomli")


def from_flags(flags: Mapping[str, str]) -> Values:
    """Return the settings of command-line flags, given as text by field. Raises ValueError for a bad value."""
    return {field: Source(check(SETTINGS[field].kind, text, SETTINGS[field].flag, text=True),
                          f"flag {SETTINGS[field].flag}") for field, text in flags.items()}
