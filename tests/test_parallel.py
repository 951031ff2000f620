"""Laws of prefill by several workers: the result of one process, from any shards, also when workers die."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests import together
from tests.oracle import TOLERANCE, assert_close
from tests.parameters import tail
from torch_xlstm_ops import config, mlstm_chunkwise, mlstm_step, slstm_sequence
from torch_xlstm_ops.models import transformers as adapter
from torch_xlstm_ops.parallel import placement, shards
from torch_xlstm_ops.parallel.sequence_parallel import SequenceParallelMode, check_splits

pytestmark = pytest.mark.usefixtures("one_thread")  # as workers have, whose kernels these are
L = 16  # as in test_mlstm_ops: each new size is a compile
NH, DHQK, DHHV = 3, 8, 16


class Toy(nn.Module):
    """A model of mLSTM layers and perhaps an sLSTM, each mixed into what comes in; its cache is all states."""

    def __init__(self, layers: str = "mm") -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.layers = layers
        sizes = (DHQK, DHQK, DHHV, 1, 1)
        self.embedding = nn.Parameter(torch.randn(32, NH * DHHV, generator=g))
        self.into = nn.ParameterList(
            torch.randn(NH * DHHV, NH * (4 * DHHV if kind == "s" else sum(sizes)), generator=g) / 7 for kind in layers
        )
        self.r = nn.Parameter(torch.randn(4, NH, DHHV, DHHV, generator=g) / 4)
        self.sizes = sizes
        self.delay = 0.0  # seconds before an sLSTM

    def forward(self, tokens: Tensor) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        x, states = self.embedding[tokens], []
        for kind, into in zip(self.layers, self.into, strict=True):
            y, state = (self.slstm if kind == "s" else self.mlstm)(x @ into)
            x, states = x + y, [*states, tuple(state)]
        return x, states

    def mlstm(self, x: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        parts = x.unflatten(-1, (NH, -1)).transpose(1, 2).split(self.sizes, -1)  # (B, NH, S, D)
        q, k, v, igate, fgate = parts
        h, state = mlstm_chunkwise(q, k, v, igate.squeeze(-1), fgate.squeeze(-1) + 2, chunk_size=L)
        return h.transpose(1, 2).flatten(2), state

    def slstm(self, x: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        time.sleep(self.delay)
        h, state = slstm_sequence(x.unflatten(-1, (4, NH, DHHV)), self.r, self.r.new_zeros(4, NH, DHHV))
        return h.flatten(2), state


def toy_call(model: Any, tokens: Tensor, before: int) -> tuple[Tensor, Any]:
    x, states = model(tokens)
    return x[:, -1], states


def tokens(S: int) -> Tensor:
    return torch.randint(0, 32, (2, S), generator=torch.Generator().manual_seed(S))


def flat(logits: Tensor, states: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [logits, *(t for state in states for t in state)]


class LocalLink:
    """A link to states in this process: shards are read one after another."""

    def __init__(self) -> None:
        self.states: dict[int, list[Tensor]] = {}

    def find(self, layer: int) -> list[Tensor]:
        return self.states.pop(layer)

    def store(self, layer: int, state: Sequence[Tensor]) -> None:
        assert layer not in self.states
        self.states[layer] = list(state)


def read(model: nn.Module, ids: Tensor, weights: Sequence[float], summarize_first: bool) -> list[Tensor]:
    link, found = LocalLink(), []
    for shard in shards.split(ids.shape[1], weights):
        mode = SequenceParallelMode(
            link, first=shard.number == 0, last=shard.last, summarize_first=summarize_first
        )
        with torch.inference_mode(), mode:
            found = flat(*toy_call(model, ids[:, shard.start:shard.stop], shard.start))
    assert not link.states
    return found


@given(S=st.integers(2, 200), weights=st.lists(st.floats(0.1, 10), min_size=1, max_size=9))
def test_shards_tile_the_prompt_in_proportion(S, weights):
    cuts = shards.split(S, weights)
    assert [t for cut in cuts for t in range(cut.start, cut.stop)] == list(range(S))
    assert [cut.number for cut in cuts] == list(range(len(cuts)))
    assert [cut.last for cut in cuts] == [False] * (len(cuts) - 1) + [True]
    spare, whole = S - shards.MIN_TOKENS * len(cuts), sum(weights[: len(cuts)])
    for cut, weight in zip(cuts, weights, strict=False):
        assert abs(cut.stop - cut.start - shards.MIN_TOKENS - spare * weight / whole) <= 1


@given(weights=st.lists(st.floats(0.1, 10), min_size=5, max_size=5),
       speeds=st.lists(st.floats(1, 1000), min_size=5, max_size=5))
def test_shards_are_kept_until_others_would_save_a_tenth_of_the_time(weights, speeds):
    def seconds(weights: Sequence[float]) -> float:  # of a token; the worker that takes longest
        return max(weight / sum(weights) / speed for weight, speed in zip(weights, speeds, strict=True))

    found = shards.rebalance(weights, speeds)
    best = 1 / sum(speeds)
    assert seconds(found) <= shards.REBALANCE * best * (1 + 1e-9)
    assert found == weights or seconds(weights) > shards.REBALANCE * best * (1 - 1e-9)


@pytest.mark.parametrize(("S", "weights"), [(1, [1.0]), (10, []), (10, [1.0, 0.0])])
def test_prompts_and_weights_that_cannot_be_split_are_refused(S, weights):
    with pytest.raises(ValueError, match=r"must (hold at least 2|be one a worker, above 0), got"):
        shards.split(S, weights)


@settings(max_examples=15)
@given(S=st.integers(2, 130), weights=st.lists(st.floats(0.2, 5), min_size=1, max_size=5),
       summarize_first=st.booleans(), layers=st.sampled_from(["mm", "msm"]))
def test_any_shards_give_the_result_of_one_process(S, weights, summarize_first, layers):
    model, ids = Toy(layers), tokens(S)
    with torch.inference_mode():
        wanted = flat(*toy_call(model, ids, 0))
    assert_close(read(model, ids, weights, summarize_first), wanted, 5 * TOLERANCE[torch.float32])


def test_a_reset_in_a_shard_drops_the_state_of_earlier_shards():
    class Packed(nn.Module):
        def forward(self, ids: Tensor) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
            x = torch.nn.functional.one_hot(ids, 32).float()[:, None].expand(-1, NH, -1, -1)
            h, state = mlstm_chunkwise(x[..., :8], x[..., 8:16], x[..., 16:32], x[..., 0], x[..., 1], chunk_size=L,
                                       reset=ids == 3)
            return h.mean(1), [state]

    ids = tokens(90)
    with torch.inference_mode():
        wanted = flat(*toy_call(Packed(), ids, 0))
    assert_close(read(Packed(), ids, [1, 1, 1], summarize_first=True), wanted, TOLERANCE[torch.float32])


def test_models_that_cannot_be_split_are_refused():
    class Steps(nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            one = torch.ones(2, NH, 8)
            return mlstm_step(one, one, one, one[..., :1], one[..., :1], one[..., None] * one[:, :, None], one,
                              one[..., :1])[0]

    mode = SequenceParallelMode(LocalLink(), first=True, last=True, summarize_first=True)
    with mode, pytest.raises(NotImplementedError, match="mlstm_step in"):
        Steps()(tokens(2))
    with pytest.raises(NotImplementedError, match=r"by mLSTM and sLSTM alone, got convolutions in 0, 1.0"):
        check_splits(nn.Sequential(nn.Conv1d(2, 2, 4), nn.Sequential(nn.Conv1d(2, 2, 4))))


def test_workers_summarise_first_where_that_costs_less_than_waiting():
    assert [shards.summarize_first(workers, 6) for workers in (1, 2, 3, 4, 8)] == [False, False, False, True, True]
    assert shards.summarize_first(2, None)


# On a cluster

ray = pytest.importorskip("ray", reason="ray is not installed")
from torch_xlstm_ops.parallel import Workers, prefill  # noqa: E402
from torch_xlstm_ops.schedules.ray import serialization  # noqa: E402

on_ray = pytest.mark.ray


class Accidents:
    """A call of the toy that has what is written in a file happen to it first, once or until the file is gone."""

    def __init__(self, folder: Path) -> None:
        self.file, self.seen = folder / "accident", folder / "seen"

    def __call__(self, model: Any, ids: Tensor, before: int) -> tuple[Tensor, Any]:
        kind = self.file.read_text() if self.file.exists() else ""
        if kind == "death" and before:
            self.file.unlink()
            os._exit(1)
        if kind == "straggler" and not before:
            time.sleep(0.05 * ids.shape[1])
        model.delay = 1.0 if kind == "late sLSTM" and not before else 0.0
        if kind == "error":
            raise ArithmeticError("a cosmic ray")
        until = time.monotonic() + 120
        while before and kind == "halt" and self.file.exists() and time.monotonic() < until:
            time.sleep(0.05)
        if kind == "sleep":
            self.seen.touch()
            time.sleep(3600)
        return toy_call(model, ids, before)


@pytest.fixture(scope="module")
def accidents(tmp_path_factory: pytest.TempPathFactory) -> Accidents:
    return Accidents(tmp_path_factory.mktemp("accidents"))


@pytest.fixture(scope="module")
def three(ray_cluster: Any, accidents: Accidents) -> Iterator[Workers]:
    """Workers of a model with both kinds of layers."""
    wanted_of(tokens(60))  # what is compiled here first, workers take from the disk
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers have no tests
    with Workers(Toy("msm"), 3, call=accidents) as workers:
        yield workers
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def wanted_of(ids: Tensor) -> list[Tensor]:
    with torch.inference_mode():
        return flat(*toy_call(Toy("msm"), ids, 0))


WEIGHTS = [[5, 1, 3], [1], [1, 1], [1, 1, 1]]  # first the most workers, which then compile at once


@on_ray
@pytest.mark.parametrize("weights", tail(WEIGHTS), ids=str)
@pytest.mark.parametrize("summarize_first", tail([True, False]), ids=["summaries", "waiting"])
def test_layers_of_both_kinds_give_the_result_of_one_process(three, weights, summarize_first):
    ids = tokens(150)
    logits, states, report = three.prefill(ids, weights, summarize_first)
    assert_close(flat(logits, states), wanted_of(ids), 5 * TOLERANCE[torch.float32])
    assert [len(read.waits) for read in report.reads] == [0, *[3] * (len(weights) - 1)]


@on_ray
def test_the_report_states_the_wait_in_slstm_layers(three, accidents):
    ids = tokens(60)
    accidents.file.write_text("late sLSTM")  # in the first shard
    report = three.prefill(ids, [1, 1, 1]).report
    accidents.file.unlink()
    assert [0.1 < read.slstm_wait <= read.waited for read in report.reads] == [False, True, True]
    assert report.slstm_wait == max(read.slstm_wait for read in report.reads)
    assert str(report).splitlines()[-1] == (
        f"sLSTM layers: 1, run by one worker after another; longest wait {report.slstm_wait:.2f} s"
    )


@on_ray
def test_the_next_prompt_has_shards_in_proportion_to_speed(three, accidents):
    def lengths() -> list[int]:
        return [read.shard.stop - read.shard.start for read in three.prefill(tokens(60)).report.reads]

    accidents.file.write_text("straggler")  # the first
    for _ in range(2):  # a worker's first prompt tells nothing: it compiles
        lengths()
    late = lengths()
    accidents.file.unlink()
    assert sum(late) == 60
    assert late[0] < 10
    given = three.prefill(tokens(60), [1, 1, 1]).report
    assert [read.shard.stop for read in given.reads] == [20, 40, 60]
    assert len(given.speeds) == 3
    assert min(given.speeds) > 0


@on_ray
def test_only_the_shard_of_a_dead_worker_is_read_again(three, accidents, caplog):
    ids = tokens(100)
    accidents.file.write_text("death")
    logits, states, report = three.prefill(ids, [1, 1])
    assert_close(flat(logits, states), wanted_of(ids), 5 * TOLERANCE[torch.float32])
    assert (report.replays, len(report.reads)) == (1, 2)
    ours = [record.getMessage() for record in caplog.records if record.name == "torch_xlstm_ops.ray"]
    assert ours == ["tokens 50 to 100: their worker died; they are read again"]
    assert three.prefill(ids, [1, 1]).report.replays == 0


@on_ray
@pytest.mark.slow
def test_states_lost_with_their_worker_are_computed_again(three, accidents):
    ids, first = tokens(100), three.pids()[0]
    accidents.file.write_text("halt")

    def kill() -> None:
        until_read = three._actors.workers[0].ready.remote()  # an actor does one thing after another
        together.until(lambda: three._prompts != prompts)
        ray.get([until_read, three._actors.workers[0].ready.remote()], timeout=60)
        os.kill(first, signal.SIGKILL)
        time.sleep(1)
        accidents.file.unlink()

    prompts = three._prompts
    killer = threading.Thread(target=kill)
    killer.start()
    logits, states, report = three.prefill(ids, [1, 1])
    killer.join(60)
    assert_close(flat(logits, states), wanted_of(ids), 5 * TOLERANCE[torch.float32])
    assert report.replays == 1


@on_ray
def test_what_a_worker_raises_reaches_the_caller_and_the_next_prompt_is_read(three, accidents):
    ids = tokens(60)
    accidents.file.write_text("error")
    with pytest.raises(ArithmeticError, match="a cosmic ray"):
        three.prefill(ids)
    accidents.file.unlink()
    logits, states, _ = three.prefill(ids)
    assert_close(flat(logits, states), wanted_of(ids), 5 * TOLERANCE[torch.float32])


@pytest.mark.slow
@on_ray
def test_an_interrupt_ends_the_workers_and_nothing_else(three, accidents):
    def interrupt() -> None:
        together.until(accidents.seen.exists)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    with (  # noqa: PT012
        pytest.raises(KeyboardInterrupt),
        Workers(Toy(), 1, call=accidents) as workers,
    ):
        pids = workers.pids()
        accidents.file.write_text("sleep")
        threading.Thread(target=interrupt).start()
        workers.prefill(tokens(60))
    accidents.file.unlink()
    assert gone(pids)
    three.prefill(tokens(60))


@on_ray
def test_workers_that_there_is_no_room_for_are_an_error_in_time(ray_cluster, monkeypatch):
    monkeypatch.setattr(placement, "RESERVE_SECONDS", 0.5)
    with pytest.raises(RuntimeError, match=r"no room for 50 workers of 1 CPU within 0.5 s: \d+ CPU are free"):
        prefill(Toy(), tokens(60), 50, call=toy_call)


@on_ray
def test_models_that_workers_cannot_read_are_refused_before_any_starts(ray_cluster):
    with pytest.raises(ValueError, match="must be an xLSTMForCausalLM of transformers, or come with call=, got Toy"):
        Workers(Toy())
    with pytest.raises(ValueError, match="workers must be a whole number of at least 1, got 0"):
        Workers(Toy(), 0, call=toy_call)
    with pytest.raises(NotImplementedError, match="got convolutions in 0"):
        Workers(nn.Sequential(nn.Conv1d(2, 2, 4)), call=toy_call)


@on_ray
@pytest.mark.slow
def test_only_the_shards_of_a_dead_node_are_read_again(ray_cluster, tmp_path):
    from tests.ray_cluster import NODE

    node, accidents = ray_cluster.add_node(**NODE), Accidents(tmp_path)
    ids = tokens(100)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with Workers(Toy("msm"), 3, call=accidents) as workers:
        accidents.file.write_text("halt")

        def kill() -> None:
            ray_cluster.remove_node(node, allow_graceful=False)
            accidents.file.unlink()

        killer = threading.Timer(3, kill)
        killer.start()
        logits, states, report = workers.prefill(ids)
        killer.join(60)
    assert_close(flat(logits, states), wanted_of(ids), 5 * TOLERANCE[torch.float32])
    assert report.replays >= 1


def gone(pids: Sequence[int]) -> bool:
    until = time.monotonic() + 30
    while (left := any(Path(f"/proc/{pid}").exists() for pid in pids)) and time.monotonic() < until:
        time.sleep(0.1)
    return not left


# transformers


@pytest.fixture(scope="module")
def model() -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    settings = transformers.xLSTMConfig(
        hidden_size=8 * DHHV, num_hidden_layers=3, num_blocks=3, num_heads=8, qk_dim_factor=DHQK / DHHV,
        vocab_size=32, mode="inference", return_last_states=True, chunk_size=L, max_inference_chunksize=37,
    )
    return transformers.xLSTMForCausalLM(settings).eval()


@pytest.fixture(scope="module")
def two(model: Any, ray_cluster: Any) -> Iterator[Workers]:
    with config.use(chunk_size=L), Workers(model, 2) as workers:
        yield workers


def one_process(model: Any, ids: Tensor) -> tuple[Tensor, Any]:
    from torch_xlstm_ops.patch import patch

    with config.use(chunk_size=L), patch(model), torch.inference_mode():
        logits, cache = adapter.forward(model, ids)
    return logits[:, -1], cache


@pytest.mark.slow
@on_ray
@pytest.mark.parametrize("weights", [[5, 3], [1], [1, 1]], ids=str)
@pytest.mark.parametrize("summarize_first", [False, True], ids=["waiting", "summaries"])
def test_logits_and_every_layers_state_are_those_of_one_process(model, two, weights, summarize_first):
    check_transformers(model, two, weights, summarize_first)


@on_ray
@pytest.mark.slow
def test_five_workers_give_the_result_of_one_process(model, ray_cluster):
    with config.use(chunk_size=L), Workers(model, 5) as workers:
        for weights in ([5, 1, 3, 0.5, 2], [1] * 5, [1], [1, 1], [3, 1, 2]):
            for summarize_first in (False, True):
                check_transformers(model, workers, weights, summarize_first)


def check_transformers(model: Any, workers: Workers, weights: Sequence[float], summarize_first: bool) -> None:
    ids = tokens(150)
    wanted_logits, wanted = one_process(model, ids)  # what is compiled here first, workers take from the disk
    logits, cache, report = workers.prefill(ids, weights, summarize_first)
    found_states = adapter.layers(cache)
    wanted_states = adapter.layers(wanted)
    assert_close(flat(logits, found_states), flat(wanted_logits, wanted_states), 5 * TOLERANCE[torch.float32])
    assert adapter.position(cache) == 150
    assert len(report.reads) == len(weights)
    following = torch.full((2, 1), 7)
    with torch.inference_mode():
        found = adapter.forward(model, following, cache).logits
        again = adapter.forward(model, following, wanted).logits
    assert_close([found], [again], 5 * TOLERANCE[torch.float32])


@pytest.mark.slow
@on_ray
def test_workers_send_one_state_per_layer_whatever_the_length(two):
    sizes = [two.prefill(tokens(S)).report.bytes_per_layer for S in (12, 48, 192)]
    c, n, m = torch.zeros(2, 8, DHQK, DHHV), torch.zeros(2, 8, DHQK), torch.zeros(2, 8, 1)
    summary = 4 * (m.numel() + c.numel() + n.numel() + m.numel())  # M dC dn, and F of M's size
    assert len(set(sizes)) == 1
    assert sizes[0] <= summary
    wide = [torch.zeros(1, 8, 256, 512), torch.zeros(1, 8, 256), torch.zeros(1, 8, 1)]
    assert len(ray.cloudpickle.dumps(serialization.to_bytes(wide))) <= 1.05 * sum(4 * t.numel() for t in wide)


@on_ray
@pytest.mark.slow
def test_generate_writes_the_same_text_with_prefill_workers(ray_cluster, capsys):
    from torch_xlstm_ops import cli

    texts = []
    for flags in ([], ["--prefill-workers", "2"]):
        assert cli.main(["generate", "--max-new-tokens", "16", "--prompt", "def main():\n" * 9, *flags]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


@pytest.mark.parametrize("flag", [["--no-patch"], ["--pool", "DIR"], ["--resume", "FILE"]], ids=lambda flag: flag[0])
def test_prefill_workers_come_alone(capsys, flag):
    from torch_xlstm_ops import cli

    assert cli.main(["generate", "--prefill-workers", "2", *flag]) == 2
    assert f"--prefill-workers must come without --no-patch, --pool, --resume, got {flag[0]}" in capsys.readouterr().err
