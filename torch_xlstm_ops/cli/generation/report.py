"""The table of measurements at the end of `generate`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from torch_xlstm_ops import config
from torch_xlstm_ops.cli.generation.meter import Measurement, Meter
from torch_xlstm_ops.cli.generation.request import GenerateRequest
from torch_xlstm_ops.cli.generation.stream import StateStore, WarmUp
from torch_xlstm_ops.cli.shared.loading import Loaded
from torch_xlstm_ops.context import state_file
from torch_xlstm_ops.maths.shapes import dtype_name
from torch_xlstm_ops.runtime import devices


def facts(request: GenerateRequest, loaded: Loaded, ran: WarmUp, meter: Meter) -> dict[str, object]:
    """Return the rows of the table: what ran, on which device, and how fast."""
    prefill, decode = meter.final("prefill"), meter.final("decode")
    peak = devices.memory(loaded.device).peak
    schedule = ", ".join(ran.schedules) or str(config.current().schedule)
    return {
        "model": str(request.model),
        "device": str(loaded.device),
        "dtype": dtype_name(loaded.dtype),
        "schedule": schedule if request.patched else "none, as not patched",
        "prefill kernel": ", ".join(ran.prefill) or "transformers native",
        "decode kernel": ", ".join(ran.decode) or "transformers native",
        "prefill tok/s": _speed(prefill),
        "decode tok/s": _speed(decode),
        "time to first token s": None if prefill is None else round(prefill.seconds, 4),
        "prefill joules/token": _joules(prefill, meter),
        "decode joules/token": _joules(decode, meter),
        "peak memory GiB": None if peak is None else round(peak / 2**30, 2),
        "new tokens": (decode.tokens if decode is not None else 0) + (prefill is not None),
    }


def tokens_read(store: StateStore, meter: Meter) -> dict[str, object]:
    """Return the row of the prompt tokens that were read, if states were kept and some may have been resumed."""
    prefill = meter.final("prefill")
    return {"prompt tokens read": None if prefill is None else prefill.tokens} if store else {}


def _speed(row: Measurement | None) -> float | None:
    return None if row is None else round(row.average_tok_s, 2)


def _joules(row: Measurement | None, meter: Meter) -> float | str | None:
    """Return joules a token, or why there are none."""
    if meter.without_energy is not None:
        return f"not counted: {meter.without_energy}"
    if row is None or row.joules is None or row.tokens == 0:
        return None
    return float(f"{row.joules / row.tokens:.3g}")


def how_to_resume(file: str, total: int) -> str:
    """Return what `--resume` does after an interrupt."""
    path = Path(file)
    if not path.exists():
        return (f"interrupted before the first piece of the prompt was read: {file} was not written; "
                "run the same command again")
    position = state_file.read(path).about["position"]
    return (f"interrupted: {file} holds the state after {position} of the prompt's {total} tokens; "
            "run the same command to resume")


def print_table(about: dict[str, object], notes: Sequence[str]) -> None:
    """Print the table and the notes: on stdout if it is a terminal, else on stderr."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, stderr=not sys.stdout.isatty())
    table = Table(show_header=False)
    for name, value in about.items():
        table.add_row(name, "-" if value is None else str(value))
    console.print(table)
    for note in notes:
        console.print(note, soft_wrap=True)
