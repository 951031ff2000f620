"""Laws of the configuration: one table, one precedence, and errors that name the source of a bad value."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
import threading
import timeit
from collections.abc import Iterator
from pathlib import Path

import pytest
from expecttest import assert_expected_inline

from torch_xlstm_ops import config
from torch_xlstm_ops.config import Config, Schedule, SLSTMSchedule, Tune

# A value of each setting for each source, and what it means.
SAMPLES = {
    "schedule": ("queued", Schedule.QUEUED),
    "chunk_size": ("64", 64),
    "segment": ("4096", 4096),
    "heads_per_band": ("2", 2),
    "workers": ("3", 3),
    "streams": ("2", 2),
    "window": ("5", 5),
    "trace": ("/dev/null/never.json", "/dev/null/never.json"),
    "mem_fraction": ("0.5", 0.5),
    "ray_address": ("head:6379", "head:6379"),
    "tuned": ("off", "off"),
    "slstm_schedule": ("parallel", SLSTMSchedule.PARALLEL),
    "kernels": ("off", "off"),
    "cuda_graphs": ("off", "off"),
    "tune": ("thompson", Tune.THOMPSON),
}
needs_toml = pytest.mark.skipif(
    sys.version_info < (3, 11) and importlib.util.find_spec("tomli") is None, reason="tomli is not installed"
)


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give each test an environment without our variables, no listeners, and nothing loaded."""
    aliases = {alias for setting in config.SETTINGS.values() for alias in setting.aliases}
    for name in list(os.environ):
        if name.startswith(config.PREFIX) or name in aliases:
            monkeypatch.delenv(name)
    monkeypatch.setattr(config.active, "_listeners", [])
    config.reload(flags={})
    yield
    monkeypatch.undo()
    config.reload(flags={})


def error(call: object, *arguments: object, **keywords: object) -> str:
    """Return the text of the ValueError that the call raises."""
    with pytest.raises(ValueError, match="must") as caught:
        call(*arguments, **keywords)  # type: ignore[operator]
    return str(caught.value)


def reloaded(monkeypatch: pytest.MonkeyPatch, **variables: str) -> Config:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return config.reload()


def test_table_and_config_have_the_same_fields_in_the_same_order() -> None:
    fields = [field.name for field in dataclasses.fields(Config)]
    assert list(config.SETTINGS) == fields == list(SAMPLES)


def test_every_default_leaves_the_choice_to_the_plan() -> None:
    assert config.current() == Config()
    assert {source.origin for source in config.sources().values()} == {"default"}


@pytest.mark.parametrize("field", SAMPLES)
def test_environment_sets_each_field(monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    text, value = SAMPLES[field]
    setting = config.SETTINGS[field]
    assert getattr(reloaded(monkeypatch, **{setting.variable: text}), field) == value
    assert config.sources()[field] == (value, f"environment variable {setting.variable}")


@pytest.mark.parametrize("alias", [a for s in config.SETTINGS.values() for a in s.aliases])
def test_former_variables_are_read_and_ours_take_precedence(monkeypatch: pytest.MonkeyPatch, alias: str) -> None:
    setting = next(s for s in config.SETTINGS.values() if alias in s.aliases)
    text, value = SAMPLES[setting.field]
    assert getattr(reloaded(monkeypatch, **{alias: text}), setting.field) == value
    other = {"schedule": "ray", "mem_fraction": "0.25"}.get(setting.field, "7")
    assert str(getattr(reloaded(monkeypatch, **{setting.variable: other}), setting.field)) == other


@pytest.mark.parametrize("old", ["queued_compiled_steps", "chunkwise--queued_compiled_steps"])
def test_former_backends_name_our_schedules(monkeypatch: pytest.MonkeyPatch, old: str) -> None:
    assert reloaded(monkeypatch, XLSTM_CHUNKWISE_BACKEND=old).schedule is Schedule.QUEUED


@needs_toml
def test_each_source_beats_the_ones_below_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "ops.toml"
    file.write_text('schedule = "recurrent"\nworkers = 1\nwindow = 1\nsegment = 1\nchunk_size = 1\n')
    monkeypatch.setenv("XLSTM_OPS_CONFIG", str(file))
    for name in ("WINDOW", "SEGMENT", "CHUNK_SIZE", "WORKERS"):
        monkeypatch.setenv(f"XLSTM_OPS_{name}", "2")
    config.reload(flags={"segment": "3", "chunk_size": "3", "workers": "3"})
    with config.use(chunk_size=4, workers=4):
        settled = config.for_call(chunk_size=5)
        assert config.sources()["workers"].origin == "config.use"
    assert settled == Config(Schedule.RECURRENT, chunk_size=5, segment=3, workers=4, window=2)
    assert config.sources()["schedule"].origin == f"file {file}"
    assert config.sources()["workers"].origin == "flag --workers"


def test_use_is_undone_even_by_an_exception_and_nests() -> None:
    def nested() -> None:
        with config.use(workers=2), config.use(streams=3) as inner:
            assert (inner.workers, inner.streams) == (2, 3)
            with config.use(workers=None):
                assert config.current().workers is None
            assert config.current() == inner
            raise KeyError

    with pytest.raises(KeyError):
        nested()
    assert config.current() == Config()


def test_use_does_not_reach_other_threads() -> None:
    seen: list[Config] = []
    with config.use(workers=2):
        thread = threading.Thread(target=lambda: seen.append(config.current()))
        thread.start()
        thread.join(60)
    assert seen == [Config()]


def test_a_call_without_arguments_keeps_the_configuration() -> None:
    with config.use(schedule="queued", chunk_size=32) as outer:
        assert config.for_call() is outer
        assert config.for_call(schedule=Schedule.RAY) == Config(Schedule.RAY, chunk_size=32)
        assert config.for_call(schedule="auto").schedule is Schedule.AUTO


def test_listeners_are_called_for_each_load_and_for_the_one_before() -> None:
    heard: list[Config] = []
    config.on_load(heard.append)
    config.reload(flags={"workers": "2"})
    assert heard == [Config(), Config(workers=2)]


def test_reading_is_cheap() -> None:
    config.current()
    assert min(timeit.repeat(config.current, number=10_000, repeat=5)) / 10_000 < 1e-6


def test_schedule_prints_as_its_name() -> None:
    assert f"{Schedule.QUEUED} {Schedule.QUEUED!s}" == "queued queued"


def test_bad_values_name_their_source(monkeypatch: pytest.MonkeyPatch) -> None:
    messages = [
        error(reloaded, monkeypatch, XLSTM_OPS_WORKERS="many"),
        error(reloaded, monkeypatch, XLSTM_OPS_WORKERS=""),
        error(reloaded, monkeypatch, XLSTM_OPS_WORKERS="2", XLSTM_OPS_MEM_FRACTION="85"),
        error(reloaded, monkeypatch, XLSTM_OPS_MEM_FRACTION="0.5", XLSTM_CHUNKWISE_BACKEND="triton"),
    ]
    monkeypatch.delenv("XLSTM_CHUNKWISE_BACKEND")
    messages += [
        error(config.reload, flags={"segment": "0"}),
        error(config.reload, flags={"trace": "trace.txt"}),
    ]
    config.reload(flags={})
    config.for_call(chunk_size=1)
    messages += [
        error(config.for_call, schedule="fast"),
        error(config.for_call, chunk_size=True),
        error(config.for_call, chunk_size=0),
        error(config.use(window=True).__enter__),
        error(config.use(workers="2").__enter__),
    ]
    assert_expected_inline("\n".join(messages), """\
environment variable XLSTM_OPS_WORKERS must be a whole number of at least 1, got 'many'
environment variable XLSTM_OPS_WORKERS must be a whole number of at least 1, got ''
environment variable XLSTM_OPS_MEM_FRACTION must be a number above 0 and at most 1, got '85'
environment variable XLSTM_CHUNKWISE_BACKEND must be one of auto, inductor, queued, ray, recurrent, got 'triton'
--segment must be a whole number of at least 1, got '0'
--trace must be a file name ending in .csv, .jsonl or .json, got 'trace.txt'
schedule must be one of auto, inductor, queued, ray, recurrent, got 'fast'
chunk_size must be a whole number of at least 1, got True
chunk_size must be a whole number of at least 1, got 0
window must be a whole number of at least 1, got True
workers must be a whole number of at least 1, got '2'""")


def test_unknown_names_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    messages = [error(reloaded, monkeypatch, XLSTM_OPS_WORKER="2")]
    monkeypatch.delenv("XLSTM_OPS_WORKER")
    messages += [
        error(reloaded, monkeypatch, XLSTM_MEM_SOFT_PCT="0.85", XLSTM_MEM_HARD_PCT="0.92"),
        error(config.reload, flags={"worker": "2"}),
    ]
    monkeypatch.delenv("XLSTM_MEM_SOFT_PCT")
    config.reload(flags={})
    messages += [
        error(config.use(worker=2).__enter__),
        error(config.use(trace="a.csv").__enter__),
    ]
    assert_expected_inline("\n".join(messages), """\
an XLSTM_OPS_* variable must be one of XLSTM_OPS_CHUNK_SIZE, XLSTM_OPS_CONFIG, XLSTM_OPS_CUDA_GRAPHS, XLSTM_OPS_HEADS_PER_BAND, XLSTM_OPS_KERNELS, XLSTM_OPS_MEM_FRACTION, XLSTM_OPS_PATCH, XLSTM_OPS_RAY_ADDRESS, XLSTM_OPS_SCHEDULE, XLSTM_OPS_SEGMENT, XLSTM_OPS_SLSTM_SCHEDULE, XLSTM_OPS_STREAMS, XLSTM_OPS_TRACE, XLSTM_OPS_TUNE, XLSTM_OPS_TUNED, XLSTM_OPS_WINDOW, XLSTM_OPS_WORKERS, got XLSTM_OPS_WORKER
XLSTM_MEM_SOFT_PCT and XLSTM_MEM_HARD_PCT must agree, as both mean XLSTM_OPS_MEM_FRACTION, got 0.85 and 0.92
a flag must be one of schedule, chunk_size, segment, heads_per_band, workers, streams, window, trace, mem_fraction, ray_address, tuned, slstm_schedule, kernels, cuda_graphs, tune, got worker
a field of config.use must be one of schedule, chunk_size, segment, heads_per_band, workers, streams, window, trace, mem_fraction, ray_address, tuned, slstm_schedule, kernels, cuda_graphs, tune, got worker
a field of config.use must not be trace, which is process-wide: use trace.record(FILE)""")  # noqa: E501


def test_an_error_stays_until_its_cause_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    error(reloaded, monkeypatch, XLSTM_OPS_WORKERS="0")
    error(config.current)
    monkeypatch.delenv("XLSTM_OPS_WORKERS")
    assert config.current() == Config()


@needs_toml
def test_bad_files_are_errors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "ops.toml"
    messages = []
    monkeypatch.setenv("XLSTM_OPS_CONFIG", str(file))
    messages.append(error(config.reload))
    for text in ("workers = 2\nworker = 3\n", 'workers = "2"\n', "[queued]\nworkers = 2\n", "workers 2\n"):
        file.write_text(text)
        messages.append(error(config.reload))
    file.write_bytes(b"trace = '\xff'")
    messages.append(error(config.reload))
    os.truncate(file, 1 << 30)
    messages.append(error(config.reload))
    file.unlink()
    os.mkfifo(file)
    messages.append(error(config.reload))
    assert_expected_inline("\n".join(messages).replace(str(tmp_path), "DIR"), """\
XLSTM_OPS_CONFIG = DIR/ops.toml must be a readable TOML file, got No such file or directory
a key in DIR/ops.toml must be one of schedule, chunk_size, segment, heads_per_band, workers, streams, window, trace, mem_fraction, ray_address, tuned, slstm_schedule, kernels, cuda_graphs, tune, got worker
workers in DIR/ops.toml must be a whole number of at least 1, got '2'
a key in DIR/ops.toml must be one of schedule, chunk_size, segment, heads_per_band, workers, streams, window, trace, mem_fraction, ray_address, tuned, slstm_schedule, kernels, cuda_graphs, tune, got queued
XLSTM_OPS_CONFIG = DIR/ops.toml must be a TOML file, got: Expected '=' after a key in a key/value pair (at line 1, column 9)
XLSTM_OPS_CONFIG = DIR/ops.toml must be a TOML file, got: 'utf-8' codec can't decode byte 0xff in position 9: invalid start byte
XLSTM_OPS_CONFIG = DIR/ops.toml must be a TOML file, got: 1073741824 bytes, more than 1048576
XLSTM_OPS_CONFIG = DIR/ops.toml must be a TOML file, got: not a regular file""")  # noqa: E501


def test_a_python_without_toml_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("XLSTM_OPS_CONFIG", "ops.toml")
    with pytest.raises(RuntimeError) as caught:
        config.reload()
    assert_expected_inline(str(caught.value), """\
XLSTM_OPS_CONFIG = ops.toml needs Python 3.11 or newer, or the package tomli: pip install tomli""")


def test_the_readme_table_shows_every_setting() -> None:
    assert_expected_inline(config.markdown(), """\
| environment | flag | TOML key | value | meaning | also read |
|---|---|---|---|---|---|
| `XLSTM_OPS_SCHEDULE` | `--schedule` | `schedule` | one of auto, inductor, queued, ray, recurrent | how segments are executed | `XLSTM_CHUNKWISE_BACKEND` |
| `XLSTM_OPS_CHUNK_SIZE` | `--chunk-size` | `chunk_size` | a whole number of at least 1 | tokens a chunk |  |
| `XLSTM_OPS_SEGMENT` | `--segment` | `segment` | a whole number of at least 1 | tokens a segment, one compiled call each |  |
| `XLSTM_OPS_HEADS_PER_BAND` | `--heads-per-band` | `heads_per_band` | a whole number of at least 1 | heads computed together, as one band | `XLSTM_MPS_HEADS_PER_BAND` |
| `XLSTM_OPS_WORKERS` | `--workers` | `workers` | a whole number of at least 1 | worker threads of the queued schedule, or Ray actors | `XLSTM_MPS_WORKERS` |
| `XLSTM_OPS_STREAMS` | `--streams` | `streams` | a whole number of at least 1 | device streams of the queued schedule | `XLSTM_MPS_STREAMS` |
| `XLSTM_OPS_WINDOW` | `--window` | `window` | a whole number of at least 1 | most tasks in flight at once |  |
| `XLSTM_OPS_TRACE` | `--trace` | `trace` | a file name ending in .csv, .jsonl or .json | record timings (.json opens in Perfetto) |  |
| `XLSTM_OPS_MEM_FRACTION` | `--mem-fraction` | `mem_fraction` | a number above 0 and at most 1 | most of the device's memory that a plan may use | `XLSTM_MEM_SOFT_PCT`, `XLSTM_MEM_HARD_PCT` |
| `XLSTM_OPS_RAY_ADDRESS` | `--ray-address` | `ray_address` | auto or HOST:PORT | the Ray cluster to attach to, instead of starting Ray here |  |
| `XLSTM_OPS_TUNED` | `--tuned` | `tuned` | on, off, or a file name ending in .json | whether auto uses what `xlstm-ops tune` found, and where that is kept |  |
| `XLSTM_OPS_SLSTM_SCHEDULE` | `--slstm-schedule` | `slstm_schedule` | one of auto, sequential, parallel | how an sLSTM sequence is executed |  |
| `XLSTM_OPS_KERNELS` | `--kernels` | `kernels` | on, off, or the path of a folder | whether compiled kernels are kept for later processes, and where |  |
| `XLSTM_OPS_CUDA_GRAPHS` | `--cuda-graphs` | `cuda_graphs` | on or off | whether small calls that come often on CUDA are replayed as graphs |  |
| `XLSTM_OPS_TUNE` | `--tune` | `tune` | one of off, online, ucb, thompson, boltzmann, cfc | whether auto also tries other plans while it is used, and how it chooses |  |""")  # noqa: E501
