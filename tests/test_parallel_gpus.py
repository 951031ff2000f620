"""Laws of where workers run and how their tensors travel, as far as they need no GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.test_parallel import Toy, flat, tokens, toy_call
from torch_xlstm_ops import trace
from torch_xlstm_ops.schedules.ray import serialization

ray = pytest.importorskip("ray", reason="ray is not installed")
from torch_xlstm_ops.parallel import Workers, device_links, device_memory, placement, transport  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
on_ray = pytest.mark.ray
CPU = torch.device("cpu")


def some() -> list[Tensor]:
    return [torch.randn(2, 3, 5), torch.randn(7).bfloat16(), torch.tensor(3), torch.empty(0, 4), torch.ones(3).bool()]


def test_tensors_of_any_dtype_survive_a_buffer():
    tensors = some()
    layout = transport.layout_of(tensors)
    buffer = torch.empty(transport.buffer_bytes(layout), dtype=torch.uint8)
    transport.pack(tensors, buffer)
    for found, wanted in zip(transport.views(buffer, layout), tensors, strict=True):
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted)
    sent = transport.pinned_bytes(tensors, buffer)
    for found, wanted in zip(serialization.from_bytes(sent, CPU), tensors, strict=True):
        assert torch.equal(found, wanted)


class Passed:
    """An event of a GPU that has passed, in order."""

    def synchronize(self) -> None:
        pass


def test_a_sender_works_in_order_and_tells_the_first_failure():
    sender, done = transport.Sender(), []

    def fail() -> None:
        raise ArithmeticError(f"after {len(done)}")

    for number in range(20):
        sender.after(Passed(), lambda number=number: done.append(number))  # type: ignore[arg-type]
    sender.after(Passed(), fail)  # type: ignore[arg-type]
    sender.after(Passed(), fail)  # type: ignore[arg-type]
    with pytest.raises(ArithmeticError, match="after 20"):
        sender.flush()
    assert done == list(range(20))
    sender.flush()


@pytest.mark.skipif(torch.cuda.is_available(), reason="for hosts without a GPU")
def test_without_a_gpu_no_memory_is_offered_or_accepted():
    assert device_links.offer(transport.Buffers(), CPU) is None
    assert not device_links.accepts(None, CPU)
    with pytest.raises(device_memory.DeviceMemoryError):
        device_memory.export(torch.zeros(3))


@pytest.mark.parametrize(("arguments", "message"), [
    (("cuda", 1, 0, "spread", None, None), "gpus must be a number above 0 and at most 1, got 0"),
    (("cuda", 1, 1.5, "spread", None, None), "gpus must be a number above 0 and at most 1, got 1.5"),
    (("cuda", 1, float("nan"), "spread", None, None), "gpus must be a number above 0 and at most 1, got nan"),
    (("cpu", 1, 0.5, "spread", None, None), "gpus must come with a model on a GPU, got 0.5"),
    (("cpu", 1, None, "near", None, None), "placement must be one of spread, pack, got near"),
    (("cpu", 1, None, "pack", "abc", None), "nodes must be a sequence of Ray's node ids, got 'abc'"),
])
def test_placements_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        placement.placement(*arguments)


def test_a_worker_takes_a_gpu_of_its_own_or_the_part_that_is_asked_for():
    assert placement.placement("cuda", 4, None, "spread", None, None).bundle == {"GPU": 1}
    assert placement.placement("cuda", 4, 0.5, "spread", None, None).bundle == {"GPU": 0.5}
    assert placement.placement("cpu", 4, None, "spread", None, None).bundle == {"CPU": 4}


@on_ray
def test_an_error_names_what_the_cluster_has(ray_cluster, monkeypatch):
    monkeypatch.setattr(placement, "RESERVE_SECONDS", 0.5)
    wanted = placement.placement("cuda", 1, 0.5, "pack", None, None)
    with pytest.raises(RuntimeError, match=(
        r"no room for 2 workers of 0.5 GPU within 0.5 s: 0 GPU are free; the cluster has \d+ nodes? \(5 CPU, 0 GPU.*"
        r"use fewer workers, or gpus= a smaller part"
    )):
        placement.reserve(2, wanted)


class Greedy:
    """A call of the toy that runs out of memory while a file is there."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __call__(self, model: Any, ids: Tensor, before: int) -> tuple[Tensor, Any]:
        if before and self.file.exists():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has 1 GiB.")
        return toy_call(model, ids, before)


@pytest.fixture
def by_value() -> Iterator[None]:
    """Send these modules' code to workers, which have no tests."""
    modules = [sys.modules[__name__], sys.modules["tests.test_parallel"]]
    for module in modules:
        ray.cloudpickle.register_pickle_by_value(module)
    yield
    for module in modules:
        ray.cloudpickle.unregister_pickle_by_value(module)


@on_ray
@pytest.mark.slow
def test_packed_workers_report_hops_and_survive_a_lack_of_memory(ray_cluster, by_value, tmp_path):
    ids, greedy = tokens(60), Greedy(tmp_path / "greedy")
    with torch.inference_mode():
        wanted = flat(*toy_call(Toy(), ids, 0))
    with Workers(Toy(), 2, call=greedy, placement="pack") as workers:
        assert len({worker.node for worker in workers._actors.started()}) == 1
        greedy.file.touch()
        with pytest.raises(RuntimeError, match=(
            r"worker 1 ran out of memory while it read tokens 30 to 60: use more workers, .*\(CUDA out of memory\)"
        )):
            workers.prefill(ids, [1, 1])
        greedy.file.unlink()
        with trace.record() as recording:
            logits, states, report = workers.prefill(ids, [1, 1], ahead=True)
        for found, exact in zip(flat(logits, states), wanted, strict=True):
            torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)
        assert report.summarize_first
        assert len(report.reads[1].hops) == 2
        assert (report.way, report.bytes_per_layer) == ("host", report.reads[0].sent[0])
        assert f"a state: {report.bytes_per_layer / 2**20:.2f} MB in" in str(report)
        hops = [entry for entry in recording.entries() if entry.phase == "hop host"]
        assert sorted((hop.layer, hop.bytes) for hop in hops) == list(enumerate(report.reads[0].sent))
        with pytest.raises(ValueError, match="ahead must come without summarize_first, got True and False"):
            workers.prefill(ids, None, False, ahead=True)


@on_ray
def test_workers_run_on_the_nodes_that_are_asked_for(ray_cluster, by_value):
    chosen = ray.nodes()[-1]["NodeID"]
    with Workers(Toy(), 2, call=toy_call, nodes=[chosen]) as workers:
        assert {worker.node for worker in workers._actors.started()} == {chosen}
