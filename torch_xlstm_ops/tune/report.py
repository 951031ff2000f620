"""An HTML page with the results of a folder's searches, and its plots as files."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna

from torch_xlstm_ops.maths.intervals import bounds, in_words
from torch_xlstm_ops.runtime import files
from torch_xlstm_ops.tune import plots, study
from torch_xlstm_ops.tune.objective import Objective
from torch_xlstm_ops.tune.records import Outcome, Record, measured

PAGE = "report.html"
_TITLES = {Objective.TIME: "Throughput", Objective.ENERGY: "Energy", Objective.PRODUCT: "Energy x time"}
_STYLE = ("body{font:15px/1.45 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em}"
          "table{border-collapse:collapse;margin:1em 0;display:block;overflow-x:auto}"
          "td,th{padding:.2em .8em;border-bottom:1px solid #ddd;"
          "text-align:left;font-variant-numeric:tabular-nums}img{max-width:100%}pre{background:#f6f6f6;padding:.6em}")


def write(folder: Path) -> list[Path]:
    """Write report.html and the plots of the searches in a folder; return their paths.

    Raises ValueError if there are none, StoreError for a store that cannot be read.
    """
    if not (folder / study.STORE).is_file():
        raise ValueError(f"--out must be a folder with searches, got {folder} without {study.STORE}")
    store = study.open_store(folder / study.STORE)
    found = {name: optuna.load_study(study_name=name, storage=store) for name in study.names(store)}
    studies = {name: study.records(one) for name, one in found.items()}
    studies = {name: records for name, records in studies.items() if measured(records)}
    if not studies:
        raise ValueError(f"--out must be a folder with searches, got {folder} without a measured trial")
    pictures = draw(folder, studies)
    parts = [f"<h1>Plans tried</h1>{_machines(found)}", *(f"<h2>{title}</h2>{_picture(path)}"
                                                          for title, path in pictures.items())]
    parts += [_section(name, records, found[name].user_attrs) for name, records in studies.items()]
    with files.replacing(folder / PAGE) as file:
        file.write("<!doctype html><html lang=en><meta charset=utf-8>"
                   "<meta name=viewport content='width=device-width'><title>xlstm-ops tune</title>"
                   f"<style>{_STYLE}</style><body>{''.join(parts)}</body></html>\n")
    return [folder / PAGE, *pictures.values()]


def draw(folder: Path, studies: Mapping[str, Sequence[Record]]) -> dict[str, Path]:
    """Write the plots and return their paths by title."""
    aims = dict.fromkeys(study.StudyName.read(name).objective for name in studies)
    pictures: dict[str, Path | None] = {
        "Reward against trial": plots.reward_by_trial(folder / "reward.png", studies),
        "What each setting explains": plots.importance(folder / "importance.png", studies),
        " and ".join(_TITLES[aim] for aim in aims): plots.throughput(folder / "throughput.png", studies),
        "Prefill against decode": plots.prefill_and_decode(folder / "prefill_decode.png", studies),
    }
    return {title: path for title, path in pictures.items() if path is not None}


def _machines(found: Mapping[str, Any]) -> str:
    facts = {str(key): str(value) for one in found.values() for key, value in one.user_attrs[study.ABOUT].items()
            if key not in ("space", "version") and value is not None}
    return _table([*facts.items()])


def _section(name: str, records: Sequence[Record], attributes: Mapping[str, Any]) -> str:
    objective = study.StudyName.read(name).objective
    counts = [(str(outcome), str(sum(record.outcome is outcome for record in records))) for outcome in Outcome]
    best = sorted(measured(records), key=lambda record: -(record.reward or 0))[:10]
    counted = any(timing.joules is not None for record in best for timing in record.timings)
    head = ("trial", f"times as {objective.adjective}", "95%", "tokens/s", *(("joules a call",) if counted else ()),
            "MB, estimated", "settings")
    rows = [(str(r.number), f"{r.reward or 0:.3f}", bounds(r.reward_low, r.reward_high),
             ", ".join(f"{t.workload}: {t.tokens_per_second:.0f}" for t in r.timings),
             *((", ".join(f"{t.workload}: {t.joules or 0:.3g}" for t in r.timings),) if counted else ()),
             f"{(r.estimated_bytes or 0) / 2**20:.0f}", " ".join(f"{k}={v}" for k, v in r.params.items()))
            for r in best]
    return (f"<h2>{html.escape(name)}</h2><p>Objective: least {html.escape(objective.meaning)}.</p>"
            f"{_ended(objective, attributes)}{_table(counts)}{_table(rows, head)}")


def _ended(objective: Objective, attributes: Mapping[str, Any]) -> str:
    """Return the text of the best plan."""
    result = attributes.get(study.RESULT)
    if result is None:
        return "<p>Not finished.</p>"
    used = "".join(f" {html.escape(t['workload'])}: {t['joules']:.3g} J a call." for t in result["timings"]
                   if t.get("joules") is not None)
    return (f"<p>Measured beside the default once more, the best is {in_words(*result['times_as_fast'])} "
            f"{objective.praise}.{used}</p><pre>{html.escape(result['plan'])}</pre>")


def _table(rows: Sequence[Sequence[str]], head: Sequence[str] = ()) -> str:
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>{f'<tr>{top}</tr>' if head else ''}{body}</table>"


def _picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<img alt="{html.escape(path.stem)}" src="data:image/png;base64,{data}">'
