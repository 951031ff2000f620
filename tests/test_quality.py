"""Laws of the quality benchmark: tasks ask what they say, ways to run a model agree, the report is the results'."""

from __future__ import annotations

import json
import math
import shutil
import sys
import types
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from benchmarks import train_mqar
from benchmarks.quality import __main__ as command
from benchmarks.quality import coherence, contenders, mqar, perplexity, report, throughput
from benchmarks.quality.coherence import Written
from benchmarks.quality.prompts import PROMPTS
from benchmarks.quality.recall import Recall, Size, draw
from benchmarks.train_demo_model import END, standard_library
from tests.parameters import tail
from torch_xlstm_ops import mlstm_chunkwise, trace
from torch_xlstm_ops.cli.shared.loading import Loaded, load
from torch_xlstm_ops.models import DEMO_MODEL

CPU = torch.device("cpu")
# What other tests compile too, with chunks of 16.
SMALL = Size(keys=32, values=8, hidden=8, NH=3, DHQK=8, DHHV=16)
SIZES = {"mlstm": SMALL, "slstm": SMALL._replace(conv=0, slstm_heads=2)}


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load(DEMO_MODEL, CPU, "float32")


def rows(P: int, B: int = 2, size: Size = SMALL) -> Any:
    return draw(size, B, P, torch.Generator().manual_seed(0))


def test_a_query_is_answered_by_the_value_that_followed_its_key() -> None:
    P = 9
    batch = rows(P, B=5)
    for ids, answers, distance in zip(*(t.tolist() for t in batch), strict=True):
        pairs = dict(zip(ids[: 2 * P : 2], ids[1 : 2 * P : 2], strict=True))
        assert len(pairs) == P
        assert sorted(ids[2 * P :]) == sorted(pairs)
        for index, key in enumerate(ids[2 * P :]):
            assert pairs[key] == answers[index] + SMALL.keys
            value_stands = 2 * P + index - distance[index]
            assert ids[value_stands - 1 : value_stands + 1] == [key, pairs[key]]


def test_more_pairs_than_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="pairs must be at most 32, the number of keys, got 33"):
        rows(33)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", SIZES)
def test_a_recall_model_gives_the_same_in_one_piece_in_pieces_and_by_steps(name: str) -> None:
    model, ids = Recall(SIZES[name]).eval(), rows(6).ids
    with torch.inference_mode():
        whole, _ = model(ids)
        for pieces, mix in (((1,), mqar.by_steps), ((5, 1, 7), mlstm_chunkwise)):
            found, states, start = [], None, 0
            for size in contenders.cut(ids.shape[1], pieces):
                logits, states = model(ids[:, start : start + size], states, mix=mix)
                found.append(logits)
                start += size
            torch.testing.assert_close(torch.cat(found, 1), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("small_chunks")
def test_every_way_to_answer_is_the_first_ones() -> None:
    conditions = contenders.Conditions(CPU, ["inductor", "queued", "recurrent"])
    result = mqar.evaluate(Recall(SMALL).eval(), [4, 6], 60, conditions)
    assert result["answers"] == {"4": 60, "6": 60}
    exact = {name: counts for name, counts in result["differing"].items() if "float" not in name or name == "float64"}
    assert {"inductor", "step by step", "in pieces", "transformers", "transformers, patched"} <= exact.keys()
    assert set(map(str, exact.values())) == {"{'4': 0, '6': 0}"}
    assert sum(bucket["answers"] for bucket in result["by_distance"]["6"].values()) == 60


def arguments() -> Namespace:
    few = ["mlstm", "--pairs", "8", "--first", "8", "--least", "8", "--tokens", "768"]
    return train_mqar.parse([*few, "--stage-steps", "80", "--last-steps", "20", "--lr", "2e-2", "--every", "10"])


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", tail(SIZES))
def test_training_learns_and_repeats_itself(name: str) -> None:
    weights, curves = [], []
    for _ in range(2):
        torch.manual_seed(0)
        model = Recall(SIZES[name])
        curves.append(train_mqar.train(model, arguments()))
        weights.append(model.state_dict())
    assert curves[0][-1]["loss"] < 0.9 * curves[0][0]["loss"]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_a_way_that_is_not_there_is_named_in_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where transformers builds its xLSTM on the package xlstm, it has no mLSTM of its own."""
    monkeypatch.setitem(sys.modules, "transformers.models.xlstm.modeling_xlstm", types.ModuleType("built on xlstm"))
    names, left_out = mqar.ways(SMALL, ["inductor"])
    assert contenders.THEIRS not in [way.name for way in names]
    assert list(left_out) == [contenders.THEIRS]
    found = {
        "size": SMALL._asdict(), "parameters": 1, "trained_pairs": 1, "answers": {"4": 60},
        "accuracy": {"inductor": {"4": 1.0}}, "differing": {"inductor": {"4": 0}}, "left_out": left_out,
        "by_distance": {},
    }
    why = "transformers builds its xLSTM on the package xlstm where that is installed"
    assert f"transformers is left out: {why}." in "\n".join(report.mqar({"models": {"mlstm": found}})).splitlines()


@pytest.mark.parametrize("name", tail(mqar.MODELS, lambda name: name == "slstm"))
def test_trained_weights_are_small_and_recall(name: str) -> None:
    from safetensors.torch import load_file

    file = mqar.weights(name)
    assert file.stat().st_size <= 4 * 2**20
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}
    model = mqar.load(file)
    batch = draw(model.size, 2, 256, torch.Generator().manual_seed(2))
    found = mqar.answer(model, batch, mqar.Way("inductor"), CPU)
    assert (found == batch.answers).double().mean() >= 0.97  # of 512; the report has more


def test_missing_weights_name_the_command_that_makes_them(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"python -m benchmarks\.train_mqar writes it"):
        mqar.load(tmp_path / "mqar_mlstm.safetensors")


@pytest.mark.parametrize("schedule", tail(["recurrent", "inductor", "queued"]))
def test_a_contender_runs_the_schedule_that_it_names(loaded: Loaded, schedule: str) -> None:
    ids = torch.arange(80)[None]
    with contenders.Contender(schedule, schedule).active(), torch.inference_mode(), trace.record() as recording:
        loaded.model(ids)
    assert {entry.schedule for entry in recording.entries()} == {schedule}


def test_pieces_make_up_the_length() -> None:
    assert contenders.cut(10, [4, 1]) == [4, 1, 4, 1]
    assert contenders.cut(6, [4, 1]) == [4, 1, 1]


def test_held_out_text_is_of_no_file_that_was_read_in_training() -> None:
    text, files = perplexity.held_out(2, 1024)
    sources = {source.path: source for split in standard_library().values() for source in split}
    trained = {source.path for source in standard_library()["train"]}
    assert files
    assert not trained & set(files)
    assert text.flatten().tolist()[:100] == sources[files[0]].tokens[:100].tolist()


def test_too_little_held_out_text_is_an_error() -> None:
    with pytest.raises(SystemExit, match="held-out files must hold"):
        perplexity.held_out(1, 10**9)


def test_cost_is_the_models_own_whatever_the_pieces(loaded: Loaded) -> None:
    text, _ = perplexity.held_out(1, 150)
    ids = F.pad(text, (1, 0), value=END)
    with torch.inference_mode():
        logits = loaded.model(ids[:, :-1]).logits.double()
        wanted = -logits.log_softmax(-1).gather(-1, text[..., None])[..., 0]
        with contenders.Contender("inductor").active():
            for pieces in ([150], [64, 1, 85]):
                torch.testing.assert_close(perplexity.cost(loaded.model, text, pieces), wanted, atol=1e-3, rtol=0)


def test_buckets_end_at_doubled_positions_and_their_means_make_the_whole() -> None:
    assert perplexity.edges(1500) == [256, 512, 1024, 1500]
    nats = torch.rand(2, 1024, dtype=torch.float64)
    first, second, third = perplexity.by_bucket(nats)
    assert (256 * first + 256 * second + 512 * third) / 1024 == pytest.approx(nats.mean().item())
    found = perplexity.compare(nats + 0.5 * (torch.arange(1024) == 600), nats)
    assert found["token_difference"] == pytest.approx(0.5)
    assert found["bucket_difference"] == pytest.approx(0.5 / 512)
    assert found["mean_difference"] == pytest.approx(0.5 / 1024)


def test_reading_again_finds_what_was_written(loaded: Loaded) -> None:
    prompts = ["import os\n\n\ndef read(path):\n", "import re\n\n\ndef find(text):\n"]
    with contenders.Contender("inductor").active(), torch.inference_mode():
        for pieces in (lambda length: [length], lambda length: [1] * length):
            written = coherence.write(loaded, prompts, 12, pieces)
            again = coherence.reread(loaded, prompts, written)
            assert coherence.divergence(again, written)["identical"] == 2
            for mine, wanted in zip(again, written, strict=True):
                torch.testing.assert_close(mine.logits, wanted.logits, atol=1e-3, rtol=0)


def test_drawn_texts_depend_on_their_seeds_alone(loaded: Loaded) -> None:
    prompts = ["def f():\n"] * 3
    with contenders.Contender("inductor").active(), torch.inference_mode():
        first, second = (coherence.write(loaded, prompts, 12, lambda length: [length], drawn=True) for _ in range(2))
    assert [text.tokens for text in first] == [text.tokens for text in second]
    assert len({tuple(text.tokens) for text in first}) > 1


def test_prompts_have_one_length_and_begin_one_function() -> None:
    assert len(set(map(len, PROMPTS))) == 1
    for prompt in PROMPTS:
        assert prompt.isascii()
        assert coherence.function(prompt + "pass\n")[0].startswith("def ")


def test_divergence_is_the_first_one_with_its_margin() -> None:
    logits = torch.tensor([[0.0, 9.0, 1.0], [5.0, 0.0, 4.5], [0.0, 0.0, 1.0]])
    wanted = Written([1, 0, 2], logits)
    found = coherence.divergence([wanted, Written([1, 2, 0], logits)], [wanted, wanted])
    assert found == {"identical": 1, "texts": 2, "parted": [{"prompt": 1, "token": 1, "margin": 0.5}]}
    assert coherence.smallest_margin([wanted]) == 0.5


def test_repetition_is_counted() -> None:
    assert coherence.distinct("a b a b", 2) == pytest.approx(2 / 3)
    assert coherence.distinct("f(x)", 2) == 1
    assert coherence.repeated_lines("x = 1\n\n  x = 1\ny = 2\nz = 3\n") == pytest.approx(1 / 4)


def test_a_function_ends_at_the_margin_and_is_cut_where_it_does_not() -> None:
    whole = "import os\n\n\ndef f(x):\n    return x\n\n"
    assert coherence.function(whole + "y = 1\nz") == ("def f(x):\n    return x\n\n", True)
    assert coherence.function(whole + "    cut off he") == ("def f(x):\n    return x\n\n", False)
    assert coherence.parses("def f(x):\n    return x\n")
    assert not coherence.parses("def f(x):\n")


def test_throughput_refuses_a_run_that_is_not_what_was_asked_for(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = list(b"x = 1\n")
    with contenders.Contender("inductor").active():
        rates = throughput.one(loaded, prompt, 4)
    assert all(math.isfinite(rate) and rate > 0 for rate in rates.values())

    def short(loaded: Loaded, prompt: list[int], *rest: Any) -> Any:
        return generate_tokens(loaded, prompt[1:], *rest)

    generate_tokens = throughput.generate_tokens
    monkeypatch.setattr(throughput, "generate_tokens", short)
    with pytest.raises(SystemExit, match="6 tokens must be read and 3 decoded"):
        throughput.one(loaded, prompt, 4)


def test_throughput_compares_transformers_own_code_in_a_dtype_that_it_can_run() -> None:
    for device, dtype, names in (
        ("cpu", "float32", ["inductor", "queued", "transformers"]),
        ("cuda", "bfloat16", ["inductor", "queued", "inductor, float32", "transformers, float32"]),
    ):
        found = throughput.contend(torch.device(device), ["inductor", "queued"])
        assert [contender.name for contender in found] == names
        assert [contender.dtype for contender in found[:2]] == [dtype] * 2
        assert all(contender.dtype == "float32" for contender in found[2:])


def test_report_is_what_the_kept_results_say(tmp_path: Path) -> None:
    kept = sorted((command.FULL / "quality" / "results").glob("*.json"))
    assert kept
    shutil.copytree(command.FULL / "quality" / "results", tmp_path / "quality" / "results")
    report.write([json.loads(file.read_text()) for file in kept], tmp_path, plots=False)
    assert (tmp_path / "QUALITY.md").read_text() == (command.FULL / "QUALITY.md").read_text()


def test_command_measures_a_part_and_draws_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    command.main(["throughput", "--quick", "--schedules", "inductor", "recurrent", "--out", str(tmp_path)])
    written = (tmp_path / "QUALITY.md").read_text()
    assert "## Throughput, cpu" in written
    assert "--quick" in written
    assert (tmp_path / "quality/results/throughput_cpu.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path / "QUALITY.md") in capsys.readouterr().out


def test_command_names_the_parts_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["perplexty"])
    wanted = "a part must be one of mqar, perplexity, coherence, throughput, all or report, got perplexty"
    assert wanted in capsys.readouterr().err


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_all_parts_in_small_agree(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    command.main(["--quick", "--schedules", "inductor", "queued", "recurrent", "--out", str(tmp_path)])
    kept = {part: tmp_path / f"quality/results/{part}_cpu.json" for part in command.PARTS}
    result = {part: json.loads(file.read_text())["result"] for part, file in kept.items()}
    for found in result["mqar"]["models"].values():
        assert min(accuracy["64"] for accuracy in found["accuracy"].values()) >= 0.97
    for run in result["perplexity"]["runs"].values():
        assert run["bucket_difference"] <= {"float32": 1e-4, "bfloat16": 2e-2, "float16": 2e-2}[run["dtype"]]
    for found in result["coherence"]["greedy"].values():
        assert found["identical"] == found["texts"] or found["dtype"] != "float32"
