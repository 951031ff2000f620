"""Plots of searches and ablations, as PNG files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from torch_xlstm_ops.tune.objective import Objective
from torch_xlstm_ops.tune.records import Record, Timing, measured
from torch_xlstm_ops.tune.study import StudyName

if TYPE_CHECKING:
    from torch_xlstm_ops.tune.ablation_row import AblationRow

COLOURS = {"random": "#7f7f7f", "ga": "#2ca02c", "tpe": "#1f77b4", "bandit": "#ff7f0e", "boltzmann": "#d62728",
           "grid": "#9467bd"}
SETTINGS = {"schedule": "schedule", "chunk_size": "tokens a chunk", "segment": "tokens a segment",
            "heads_per_band": "heads a band", "workers": "workers", "streams": "streams", "window": "window"}
_UNITS = {Objective.TIME: "tokens/s", Objective.ENERGY: "joules a token", Objective.PRODUCT: "joule-seconds a call"}
QUEUED_ONLY = ("workers", "streams", "window")  # settings that an inductor plan does not read


class Panel(NamedTuple):
    """What the studies of one panel have in common."""

    workload: str
    objective: Objective

    def __str__(self) -> str:
        end = "" if self.objective is Objective.TIME else f"\nobjective: {self.objective.meaning}"
        return self.workload + end


def installed() -> bool:
    """Return whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def reward_by_trial(path: Path, studies: Mapping[str, Sequence[Record]]) -> Path:
    """Plot each trial as a dot, and the best so far as a line, in a panel for each workload."""
    panels: dict[Panel, list[Sequence[Record]]] = {}
    for name, records in studies.items():
        panels.setdefault(panel_of(name), []).append(records)
    figure, axes = _panels(len(panels), width=5.6)
    for axis, (panel, members) in zip(axes, panels.items(), strict=True):
        labelled: set[str] = set()
        for records in members:
            rewards = [record.reward for record in measured(records) if record.reward is not None]
            method = records[0].method
            label = None if method in labelled else method
            labelled.add(method)
            numbers = range(1, len(rewards) + 1)
            axis.plot(numbers, rewards, ".", color=COLOURS[method], alpha=0.3, markersize=4)
            axis.plot(numbers, list(accumulate(rewards, max)), drawstyle="steps-post", color=COLOURS[method],
                      label=label, linewidth=1.5)
        axis.axhline(1, color="black", linewidth=0.6, linestyle=":")
        axis.set(xlabel="plans measured", ylabel=f"times {panel.objective.praise}")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_title(str(panel), fontsize=8)
        axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return _save(figure, path)


def importance(path: Path, studies: Mapping[str, Sequence[Record]]) -> Path:
    """Plot the share of the rewards' variance that each setting explains, in a panel for each workload."""
    panels = by_panel(studies)
    figure, axes = _panels(len(panels), width=5.0)
    for axis, (panel, records) in zip(axes, panels.items(), strict=True):
        found = explained(records)
        names = sorted(found, key=found.__getitem__)
        axis.barh([SETTINGS[name] for name in names], [100 * found[name] for name in names], color="#1f77b4")
        axis.set(xlabel=f"% of the variance of log(times {panel.objective.praise})", xlim=(0, 100))
        axis.set_title(str(panel), fontsize=8)
    return _save(figure, path)


def throughput(path: Path, studies: Mapping[str, Sequence[Record]]) -> Path:
    """Plot tokens a second against chunk size, heads per band and workers, a row for each workload.

    A search for energy has joules a token instead, one for the product joule-seconds a call.
    """
    panels = by_panel(studies)
    shown = ("chunk_size", "heads_per_band", "workers")
    figure, axes = _panels(len(panels) * len(shown), columns=len(shown))
    for row, (panel, records) in enumerate(panels.items()):
        for column, name in enumerate(shown):
            _scatter(axes[row * len(shown) + column], records, name, panel)
    return _save(figure, path)


def prefill_and_decode(path: Path, studies: Mapping[str, Sequence[Record]]) -> Path | None:
    """Plot prefill against decode, one dot for each plan, a panel for each objective; None if no trial has both."""
    found: dict[Objective, list[tuple[tuple[float, float], Record]]] = {}
    for name, records in studies.items():
        objective = panel_of(name).objective
        for record in measured(records):
            pair = _both_phases(record, objective)
            if pair is not None:
                found.setdefault(objective, []).append((pair, record))
    if not found:
        return None
    figure, axes = _panels(len(found), width=6.0)
    for axis, (objective, pairs) in zip(axes, found.items(), strict=True):
        for schedule, marker in (("inductor", "o"), ("queued", "^"), ("ray", "s")):
            points = [pair for pair, record in pairs if record.key[0] == schedule]
            if points:
                axis.plot(*zip(*points, strict=True), marker, linestyle="", label=schedule, alpha=0.7)
        unit = _UNITS[objective]
        axis.set(xlabel=f"reading the prompt, {unit}", ylabel=f"decode, {unit}", xlim=(0, None), ylim=(0, None))
        axis.set_title(f"objective: {objective.meaning}", fontsize=8)
        axis.legend(frameon=False, loc="lower left")
    return _save(figure, path)


def ablation(path: Path, tables: Sequence[Sequence[AblationRow]], about: Mapping[str, Any]) -> Path:
    """Plot each value relative to the default, in a row for each workload and a panel for each setting.

    about: the device, torch, and the objective if that is not time.
    """
    objective = Objective(about.get("objective", Objective.TIME))
    settings = list(dict.fromkeys(row.setting for table in tables for row in table))
    figure, axes = _panels(len(tables) * len(settings), columns=len(settings), width=2.6)
    for number, table in enumerate(tables):
        for column, setting in enumerate(settings):
            axis = axes[number * len(settings) + column]
            rows = [row for row in table if row.setting == setting and row.times_as_fast is not None]
            heights = [row.times_as_fast or 0 for row in rows]
            errors = [[max(0, h - (row.low or h)) for h, row in zip(heights, rows, strict=True)],
                      [max(0, (row.high or h) - h) for h, row in zip(heights, rows, strict=True)]]
            colours = ["#ff7f0e" if row.default else "#1f77b4" for row in rows]
            axis.bar([str(row.value) for row in rows], heights, yerr=errors, color=colours, capsize=2)
            axis.axhline(1, color="black", linewidth=0.6, linestyle=":")
            axis.set(title=SETTINGS[setting] + (" (queued)" if setting in QUEUED_ONLY else ""))
            axis.tick_params(axis="x", labelrotation=45)
            if column == 0 and table:
                axis.set(ylabel=f"{table[0].workload}\ntimes {objective.praise}")
    figure.suptitle(f"{about.get('device')}, torch {about.get('torch')}; objective: {objective.meaning}; "
                    "orange: the default", fontsize=9)
    return _save(figure, path)


def panel_of(study: str) -> Panel:
    """Return the panel of a study."""
    name = StudyName.read(study)
    return Panel(name.workload, name.objective)


def by_panel(studies: Mapping[str, Sequence[Record]]) -> dict[Panel, list[Record]]:
    """Return the measured trials of each panel, from all its studies."""
    panels: dict[Panel, list[Record]] = {}
    for name, records in studies.items():
        panels.setdefault(panel_of(name), []).extend(measured(records))
    return panels


def explained(records: Sequence[Record]) -> dict[str, float]:
    """Return the share of the variance of log rewards between the means of each setting's values.

    Settings of the queued schedule are compared among its plans only.
    """
    found = {}
    for name in dict.fromkeys(name for record in records for name in record.params):
        groups: dict[Any, list[float]] = {}
        for record in records:
            if record.reward and (name not in QUEUED_ONLY or record.key[0] != "inductor"):
                groups.setdefault(record.params.get(name), []).append(math.log(record.reward))
        every = [log for group in groups.values() for log in group]
        if len(groups) < 2:
            continue
        mean = fmean(every)
        total = sum((log - mean) ** 2 for log in every)
        between = sum(len(group) * (fmean(group) - mean) ** 2 for group in groups.values())
        found[name] = between / total if total else 0.0
    return found


def _scatter(axis: Any, records: Sequence[Record], name: str, panel: Panel) -> None:
    better = max if panel.objective is Objective.TIME else min
    used = [r for r in records if name in r.params and (name not in QUEUED_ONLY or r.key[0] != "inductor")]
    values = sorted({record.params[name] for record in used})
    best: dict[Any, float] = {}
    for record in used:
        shown = _shown(record.timings[0], panel.objective) if record.timings else 0.0
        place = values.index(record.params[name])
        colour = "#1f77b4" if record.key[0] == "inductor" else "#ff7f0e"
        axis.plot(place, shown, ".", color=colour, alpha=0.4)
        best[place] = better(best.get(place, shown), shown)
    places = sorted(best)
    axis.plot(places, [best[place] for place in places], color="black", linewidth=1)
    axis.set_xticks(range(len(values)), [str(value) for value in values])
    axis.set(xlabel=SETTINGS[name] + (" (queued)" if name in QUEUED_ONLY else ""), ylabel=_UNITS[panel.objective],
             ylim=(0, None))
    axis.set_title(f"{panel}\nblue inductor, orange queued, line: the best", fontsize=8)


def _shown(timing: Timing, objective: Objective) -> float:
    """Return a timing in the unit of its objective."""
    if objective is Objective.TIME:
        return timing.tokens_per_second
    joules = timing.joules or 0.0
    return joules / timing.tokens if objective is Objective.ENERGY else joules * timing.median_ms / 1e3


def _both_phases(record: Record, objective: Objective) -> tuple[float, float] | None:
    found: dict[str, Timing] = {timing.phase: timing for timing in record.timings}
    prefill = found.get("prefill") or found.get("first-token")
    if prefill is None or "decode" not in found:
        return None
    return _shown(prefill, objective), _shown(found["decode"], objective)


def _panels(count: int, columns: int | None = None, width: float = 4.2) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    columns = columns or min(max(count, 1), 3)
    lines = -(-max(count, 1) // columns)
    figure = Figure(figsize=(width * columns, 3.4 * lines), layout="constrained")
    axes = [figure.add_subplot(lines, columns, number + 1) for number in range(count)]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    return path
