"""Laws of the report and the ablation: they show the measurements, in self-contained files."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import optuna
import pytest

from tests.test_tune import Table, search, space
from torch_xlstm_ops.maths.intervals import Interval
from torch_xlstm_ops.tune import ablate, plots, report
from torch_xlstm_ops.tune.bench import Measured
from torch_xlstm_ops.tune.records import Outcome, Record, Timing
from torch_xlstm_ops.tune.space import Candidate
from torch_xlstm_ops.tune.study import StudyName, all_records, open_store

PNG = b"\x89PNG\r\n\x1a\n"


class Timetable(Table):
    """Knows prefill and decode; chunks decide over the one, nothing over the other."""

    phases = ("prefill", "decode")

    def measure(self, challenger: Candidate, best: Candidate | None, seconds: float) -> Measured:
        found = super().measure(challenger, best, seconds)
        speed = 1000 * self.speed(challenger)
        timings = tuple(
            Timing(phase + " 1024", phase, 1.0, 1024, 6, 1.0, 0.9, 1.1, 1.0, found.times_as_fast.value,
                   speed if phase == "prefill" else 300.0, 0.0) for phase in self.phases
        )
        return found._replace(timings=timings)


class OnlyPrefill(Timetable):
    phases = ("prefill",)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a folder with searches by two methods."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    store = open_store(tmp_path / "study.sqlite")
    for method in ("random", "tpe"):
        search(Timetable(), name=f"prefill-1-{method}-seed0", method=method, store=store, trials=8).run()
    return tmp_path


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.smoke
def test_the_page_holds_its_pictures_and_names_every_search(folder: Path) -> None:
    written = report.write(folder)
    assert [path.name for path in written] == ["report.html", "reward.png", "importance.png", "throughput.png",
                                               "prefill_decode.png"]
    assert all(path.read_bytes().startswith(PNG) for path in written[1:])
    page = written[0].read_text(encoding="utf-8")
    links = _Links()
    links.feed(page)
    assert links.open == []
    assert len(links.sources) == 4
    assert all(source.startswith("data:image/png;base64,") for source in links.sources)
    assert all(f"<h2>prefill-1-{method}-seed0</h2>" in page for method in ("random", "tpe"))
    assert page.count("Measured beside the default once more") == 2


class Counted(Timetable):
    """Counts the energy too: a plan that is twice as good takes half the joules."""

    def measure(self, challenger: Candidate, best: Candidate | None, seconds: float) -> Measured:
        found = super().measure(challenger, best, seconds)
        return found._replace(timings=tuple(
            dataclasses.replace(timing, joules=2048 / self.speed(challenger)) for timing in found.timings
        ))


@pytest.mark.parametrize(("objective", "adjective", "unit", "meaning", "title"), [
    ("energy", "frugal", "joules a token", "energy (joules)", "Energy"),
    ("product", "good", "joule-seconds a call", "energy x time (joule-seconds)", "Energy x time"),
])
def test_a_search_for_less_energy_is_shown_as_one(
    objective: str, adjective: str, unit: str, meaning: str, title: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    figures: dict[str, Any] = {}
    save = plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: save(figures.setdefault(path.name, figure), path))
    name = f"prefill-1-tpe-seed0-{objective}"
    search(Counted(), name=name, method="tpe", store=open_store(tmp_path / "study.sqlite"), trials=6).run()
    page = report.write(tmp_path)[0].read_text(encoding="utf-8")
    assert f"<h2>{title}</h2>" in page
    assert f"<p>Objective: least {meaning}.</p>" in page
    assert f"<th>times as {adjective}</th>" in page
    assert "<th>joules a call</th>" in page
    assert re.search(rf"the best is [^<]* as {adjective} as the default\. prefill 1024: [\d.e+]+ J a call\.", page)
    rewards, speeds, phases = (figures[f"{stem}.png"].axes[0] for stem in ("reward", "throughput", "prefill_decode"))
    assert rewards.get_ylabel() == f"times as {adjective} as the default"
    assert rewards.get_title() == f"prefill-1\nobjective: {meaning}"
    assert f"objective: {meaning}" in speeds.get_title()
    assert (speeds.get_ylabel(), phases.get_xlabel()) == (unit, f"reading the prompt, {unit}")
    joules = [2048 / timing.tokens_per_second * 1000 for timing in _timings(tmp_path)]
    scale = 1 / 1024 if objective == "energy" else 1e-3
    shown = [float(line.get_ydata()[0]) for line in speeds.lines[:-1]]
    assert sorted(shown) == pytest.approx(sorted(value * scale for value in joules))
    assert speeds.lines[-1].get_ydata()[0] == pytest.approx(min(
        y for x, y in ((line.get_xdata()[0], line.get_ydata()[0]) for line in speeds.lines[:-1]) if x == 0))


def _timings(folder: Path) -> list[Timing]:
    return [record.timings[0] for record in all_records(open_store(folder / "study.sqlite")) if record.timings
            if record.outcome is Outcome.MEASURED]


def test_the_parts_of_a_study_s_name_are_read_back() -> None:
    for text in ("prefill=0.7+decode=0.3-1x4x2048x64x64-float32-cpu-tpe-seed3",
                 "train-1x1-bfloat16-cuda-ga-seed0-energy", "p-ga-seed1-product"):
        assert str(StudyName.read(text)) == text
    assert StudyName.read("a-b-ga-seed1-energy") == ("a-b", "ga", 1, "energy")


def test_there_is_no_picture_of_what_was_not_measured(tmp_path: Path) -> None:
    store = open_store(tmp_path / "study.sqlite")
    search(OnlyPrefill(), name="prefill-1-random-seed0", store=store, trials=4).run()
    assert "prefill_decode.png" not in [path.name for path in report.write(tmp_path)]


def test_a_trial_without_an_interval_is_shown_without_one(tmp_path: Path) -> None:
    class Hurried(OnlyPrefill):
        wide = True

        def measure(self, challenger: Candidate, best: Candidate | None, seconds: float) -> Measured:
            found = super().measure(challenger, best, seconds)
            self.wide = not self.wide
            value = found.times_as_fast.value
            bounds = (0.0, float("inf")) if self.wide else (value, value)
            return found._replace(times_as_fast=Interval(value, *bounds))

    store = open_store(tmp_path / "study.sqlite")
    search(Hurried(), name="prefill-1-random-seed0", store=store, trials=8).run()
    page = report.write(tmp_path)[0].read_text(encoding="utf-8")
    shown = re.findall(r"<tr><td>\d+</td><td>([\d.]+)</td><td>(.*?)</td>", page)
    known = [(value, bounds) for value, bounds in shown if bounds != "no interval, too few rounds"]
    assert 0 < len(known) < len(shown)
    assert all(bounds == f"{value} to {value}" for value, bounds in known)


def test_a_folder_without_searches_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--out must be a folder with searches"):
        report.write(tmp_path)


def record(reward: float, **params: object) -> Record:
    key = [str(params["schedule"])]
    return Record("s", 0, "grid", 0, Outcome.MEASURED, dict(params), key, "", reward)


def test_a_setting_explains_what_it_alone_decides() -> None:
    rewards = {("inductor", 16): 1.0, ("inductor", 32): 4.0, ("queued", 16): 1.0, ("queued", 32): 4.0}
    found = plots.explained([record(reward, schedule=s, chunk_size=L) for (s, L), reward in rewards.items()])
    assert found == pytest.approx({"schedule": 0.0, "chunk_size": 1.0})


def test_workers_are_judged_among_the_queues_plans() -> None:
    found = plots.explained([
        record(1.0, schedule="inductor", workers=1), record(9.0, schedule="inductor", workers=2),
        record(2.0, schedule="queued", workers=1), record(4.0, schedule="queued", workers=2),
    ])
    assert found["workers"] == pytest.approx(1.0)


# Ablations


def test_an_ablation_changes_one_setting_at_a_time() -> None:
    place = space()
    found = list(ablate.changes(place))
    assert {setting for setting, _, _ in found} == set(place.choices)
    for setting, value, candidate in found:
        wanted = {**place.default.params, setting: value}
        if setting == "workers":
            wanted["schedule"] = "queued"
        assert candidate == place.candidate(wanted)


def test_an_ablation_is_a_table_and_a_picture(tmp_path: Path) -> None:
    class Broken(OnlyPrefill):
        def measure(self, challenger: Candidate, best: Candidate | None, seconds: float) -> Measured:
            if challenger.plan.chunk_size == 16:
                raise MemoryError("no room")
            return super().measure(challenger, best, seconds)

    shown: list[ablate.AblationRow] = []
    rows = ablate.measure("prefill 1024", space(), Broken(), 0.1, shown.append)
    assert rows == shown
    (default, *_) = [row for row in rows if row.default]
    assert default.times_as_fast == 1.0
    (broken,) = [row for row in rows if row.reason]
    assert (broken.setting, broken.value, broken.times_as_fast) == ("chunk_size", 16, None)
    assert re.search(r"chunk_size +16 +MemoryError: no room", str(broken))
    written = ablate.write(tmp_path, [rows], {"device": "here", "torch": "2"})
    assert [path.name for path in written] == ["ablation.json", "ablation.csv", "ablation.png"]
    assert len(json.loads(written[0].read_text())["rows"]) == len(rows)
    with written[1].open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    assert written[2].read_bytes().startswith(PNG)


def test_an_interval_that_is_not_known_is_no_number(tmp_path: Path) -> None:
    class Unsure(OnlyPrefill):
        def measure(self, challenger: Candidate, best: Candidate | None, seconds: float) -> Measured:
            found = super().measure(challenger, best, seconds)
            return found._replace(times_as_fast=Interval(2.0, 0.0, float("inf")))

    rows = ablate.measure("prefill 1024", space(), Unsure(), 0.1, lambda row: None)
    assert {(row.low, row.high) for row in rows} == {(None, None)}
    json.loads(ablate.write(tmp_path, [rows], {})[0].read_text(), parse_constant=lambda name: pytest.fail(name))
