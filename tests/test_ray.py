"""Laws of the ray schedule: the same results as other schedules, also when actors fail or die."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor

from tests.oracle import GRADIENT_TOLERANCE, TOLERANCE, Sizes, assert_close, draw, exact, weigh
from tests.parameters import tail
from tests.processes import marked
from torch_xlstm_ops import config, mlstm_chunkwise, schedules, trace
from torch_xlstm_ops.config import Config, Schedule
from torch_xlstm_ops.schedules.plan import Machine, Shape, make
from torch_xlstm_ops.schedules.queue.task_runner import TaskError

pytest.importorskip("ray", reason="ray is not installed")
from torch_xlstm_ops.schedules import ray as schedule
from torch_xlstm_ops.schedules.ray import actor_pool, cluster

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("one_thread")]  # as actors have, whose kernels these are
L = 16  # as in test_mlstm_ops: each new size is a compile
BANDS = {"segment": 2 * L, "heads_per_band": 2, "workers": 2}
ONE_BAND = {"segment": 2 * L, "heads_per_band": 6, "workers": 2}  # which actors share by a scan over summaries


def call(args: Sequence[Tensor], name: str = "ray") -> list[Tensor]:
    h, state = mlstm_chunkwise(*args, chunk_size=L, schedule=name)
    return [h, *state]


@pytest.mark.slow
@pytest.mark.parametrize("plan", [BANDS, ONE_BAND, {"workers": 2}], ids=["bands", "scan", "default"])
def test_results_and_gradients_equal_inductors(ray_cluster, plan):
    args, found, gradients = [t.requires_grad_() for t in draw(Sizes(S=100))], {}, {}
    actor_pool.get("cpu", 2)  # they start meanwhile
    with config.use(**plan):
        for name in ("inductor", "ray"):  # what is compiled here first, actors take from the disk
            found[name] = call(args, name)
            gradients[name] = torch.autograd.grad(weigh(found[name]), args)
    assert_close(found["ray"], found["inductor"], 1e-6)
    # An actor has one thread, the caller may have more: sums are split differently; denominators near 0 magnify that.
    assert_close(gradients["ray"], gradients["inductor"], GRADIENT_TOLERANCE[torch.float32])
    assert all(t.is_leaf or t.grad_fn is not None for t in found["ray"])
    for t in gradients["ray"]:
        t.add_(1)  # nothing that the object store holds


@pytest.mark.slow
def test_bfloat16_streams_are_sent_as_they_are(ray_cluster):
    args = draw(Sizes(S=100), torch.bfloat16)
    with config.use(**BANDS, window=1), torch.inference_mode():  # one actor, which compiles
        found = call(args)
    assert found[0].dtype == torch.bfloat16
    assert_close(found, exact(args), TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("plan", tail([BANDS, ONE_BAND], 0), ids=["bands", "scan"])
def test_nan_and_infinity_spread_as_in_the_recurrence(ray_cluster, plan):
    args = draw(Sizes(S=70))
    args[2][0, 1, 22] = float("nan")
    with config.use(**plan):
        found = call(args)
    for a, b in zip(found, exact(args), strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())


@pytest.mark.smoke
def test_a_call_repeated_gives_the_same_bits_from_the_same_actors(ray_cluster):
    args = draw(Sizes(S=100))
    with config.use(**ONE_BAND):
        first = call(args)
        assert_close(first, exact(args), TOLERANCE[torch.float32])
        pids = actor_pool.get("cpu", 2).pids()
        for _ in range(5):
            assert all(torch.equal(a, b) for a, b in zip(call(args), first, strict=True))
    assert actor_pool.get("cpu", 2).pids() == pids
    assert os.getpid() not in pids


def test_a_trace_names_each_task_its_actor_and_the_queue_depth(ray_cluster):
    with config.use(**BANDS, window=4), trace.record() as recording:
        trace.set_layer(3)
        call(draw(Sizes(S=100)))
        trace.set_layer(None)
    tasks = {(b, s) for b in range(3) for s in range(4)}
    for schedule_s, op in ((True, "mlstm_chunkwise"), (False, "actor")):
        entries = [e for e in recording.entries() if e.op.startswith(op)]
        assert {(e.band, e.segment) for e in entries} == tasks, schedule_s
        assert {(e.schedule, e.layer) for e in entries} == {("ray", 3)}
    assert {e.queue_depth for e in entries} <= {1, 2, 3, 4}
    assert all(e.bytes and e.bytes > 0 for e in entries)


def test_a_busy_actor_sends_heartbeats_to_trace_and_log(ray_cluster, monkeypatch, caplog, tmp_path):
    real, enough = schedule._forward_task, tmp_path / "enough"

    def slow(chunk_size: int, kernels: Any, args: list[Tensor]) -> list[Tensor]:
        while bool((args[0] == 7).any()) and not enough.exists():
            time.sleep(0.05)
        return real(chunk_size, kernels, args)

    def release() -> None:
        wait_for(lambda: ("heartbeat", 1, 1) in {(e.phase, e.band, e.segment) for e in recording.entries()})
        enough.touch()

    monkeypatch.setattr(schedule, "_forward_task", slow)
    monkeypatch.setattr(actor_pool, "HEARTBEAT_SECONDS", 0.1)
    args = draw(Sizes(S=100))
    args[0][0, 2, 40] = 7  # in band 1, segment 1
    caplog.set_level(logging.INFO, "torch_xlstm_ops.ray")
    with config.use(**BANDS, window=4), trace.record() as recording:
        releasing = threading.Thread(target=release)
        releasing.start()
        call(args)
        releasing.join(60)
    entries = [e for e in recording.entries() if (e.band, e.segment) == (1, 1)]
    (task,) = (e for e in entries if e.phase == "remote")
    beats = [e for e in entries if e.phase == "heartbeat"]
    assert beats
    assert {(e.op, e.schedule) for e in beats} == {(task.op, "ray")}
    assert all(task.start_us < e.start_us < task.start_us + task.duration_us for e in beats)
    assert {e.queue_depth for e in beats} <= {1, 2, 3, 4}
    assert any(line.startswith(f"band 1, segment 1: {task.op} has worked for") for line in caplog.messages)


def test_an_actor_that_does_not_answer_is_logged(ray_cluster, monkeypatch, caplog):
    monkeypatch.setattr(actor_pool, "HEARTBEAT_SECONDS", 0.2)

    def told() -> bool:
        return any(line.endswith("and does not answer") for line in caplog.messages)

    def wake(pids: Sequence[int]) -> None:
        wait_for(told)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)

    with config.use(**BANDS):
        call(draw(Sizes(S=40)))
        pids = actor_pool.get("cpu", 2).pids()
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        waking = threading.Thread(target=wake, args=(pids,))
        waking.start()
        args = draw(Sizes(S=40), seed=1)
        found = call(args)
        waking.join(60)
    assert_close(found, exact(args), TOLERANCE[torch.float32])
    assert told()


def wait_for(law: Callable[[], bool]) -> None:
    """Return when a law holds, or after a minute."""
    until = time.monotonic() + 60
    while not law() and time.monotonic() < until:
        time.sleep(0.05)


def test_text_of_a_plan():
    settings = Config(schedule=Schedule.RAY, workers=6, streams=1)
    plan = make(Shape(8, 8192, 256, 512), "cpu", settings, Machine(2, actors=4))
    assert_expected_inline(str(plan), """\
schedule  ray
rows      8 in 4 bands of 2
tokens    8192 in 2 segments of 4096 by 128
workers   4, 1 thread each
window    8 tasks in flight, about 384.0 MB
note      the cluster has room for 4: 4 of 6 workers used
note      actors have no streams of ours: 0 of 1 stream used

band 0    0 -> 1
band 1    0 -> 1
band 2    0 -> 1
band 3    0 -> 1""")
    plan = make(Shape(8, 8192, 256, 512), "mps", settings, Machine(2, actors=1))
    assert plan.workers == 1
    assert plan.notes[0] == "MPS has one GPU, which one actor owns: 1 of 6 workers used"


# Accidents


def test_an_error_names_its_task_and_the_next_call_works(ray_cluster, monkeypatch):
    real = schedule._forward_task

    def failing(chunk_size: int, kernels: Any, args: list[Tensor]) -> list[Tensor]:
        if bool((args[0] == 7).any()):
            raise ArithmeticError("a cosmic ray")
        return real(chunk_size, kernels, args)

    args = draw(Sizes(S=100))
    args[0][0, 2, 40] = 7  # in band 1, segment 1
    with config.use(**BANDS):
        monkeypatch.setattr(schedule, "_forward_task", failing)
        with pytest.raises(TaskError, match=r"band 1, segment 1\) of the ray schedule .*ArithmeticError: a cosmic ray"):
            call(args)
        monkeypatch.undo()
        assert_close(call(args), exact(args), TOLERANCE[torch.float32])


def dying(monkeypatch: pytest.MonkeyPatch, sign: Path, deaths: int) -> None:
    """Have the actor that does the task with a 7 in it die, so many times."""
    real = schedule._forward_task

    def run(chunk_size: int, kernels: Any, args: list[Tensor]) -> list[Tensor]:
        count = len(sign.read_text()) if sign.exists() else 0
        if count < deaths and bool((args[0] == 7).any()):
            sign.write_text("x" * (count + 1))
            os._exit(1)
        return real(chunk_size, kernels, args)

    monkeypatch.setattr(schedule, "_forward_task", run)


def test_only_the_tasks_of_a_dead_actor_are_repeated(ray_cluster, monkeypatch, tmp_path, caplog):
    dying(monkeypatch, tmp_path / "sign", deaths=1)
    args = draw(Sizes(S=100))
    args[0][0, 2, 40] = 7
    with config.use(**BANDS, window=2), caplog.at_level(logging.WARNING, "torch_xlstm_ops.ray"):
        found = call(args)
    assert_close(found, exact(args), TOLERANCE[torch.float32])
    ours = [record.getMessage() for record in caplog.records if record.name == "torch_xlstm_ops.ray"]
    assert any(line.startswith("band 1, segment 1: actor") for line in ours)
    assert 1 <= len(ours) <= 2  # the task, and perhaps the one behind it


@pytest.mark.slow
def test_a_task_that_kills_every_actor_fails(ray_cluster, monkeypatch, tmp_path):
    dying(monkeypatch, tmp_path / "sign", deaths=100)
    monkeypatch.setattr(actor_pool, "MAX_RETRIES", 1)
    args = draw(Sizes(S=40))
    args[0][0, 0, 0] = 7
    with config.use(**BANDS), pytest.raises(TaskError, match=r"2 actors died while they ran one task"):
        call(args)


@pytest.mark.slow
def test_only_our_actors_are_ended(ray_cluster):
    import ray

    class Theirs:
        def answer(self) -> int:
            return 42

    theirs = ray.remote(Theirs).options(num_cpus=0).remote()
    with config.use(**BANDS):
        call(draw(Sizes(S=40)))
    pids = actor_pool.get("cpu", 2).pids()
    actor_pool.close()
    assert ray.get(theirs.answer.remote(), timeout=60) == 42
    assert ray.is_initialized()
    until = time.monotonic() + 30
    while any(os.path.exists(f"/proc/{pid}") for pid in pids) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


@pytest.mark.slow
def test_a_dead_node_changes_no_result(ray_cluster, monkeypatch):
    from tests.ray_cluster import NODE

    real = schedule._forward_task

    def slow(chunk_size: int, kernels: Any, args: list[Tensor]) -> list[Tensor]:
        time.sleep(1)
        return real(chunk_size, kernels, args)

    monkeypatch.setattr(schedule, "_forward_task", slow)
    node = ray_cluster.add_node(**NODE)
    args = draw(Sizes(S=200))
    killer = threading.Timer(8, lambda: ray_cluster.remove_node(node, allow_graceful=False))
    killer.start()
    with config.use(segment=L, heads_per_band=2, workers=9):
        found = call(args)
    killer.join(60)
    assert_close(found, exact(args), TOLERANCE[torch.float32])


@pytest.mark.soak
def test_more_than_the_object_store_holds_goes_through_it(ray_cluster):
    args = draw(Sizes(B=1, NH=4, S=65_536, DHQK=64, DHHV=64), state=False)
    with config.use(segment=65_536, heads_per_band=1, workers=2), torch.inference_mode():
        h, _ = mlstm_chunkwise(*args, chunk_size=64, schedule="ray")
        wanted, _ = mlstm_chunkwise(*args, chunk_size=64, schedule="inductor")
    assert_close([h], [wanted], TOLERANCE[torch.float32])


def test_a_gpu_that_no_node_has_is_an_error_at_once(ray_cluster):
    with pytest.raises(RuntimeError, match="the Ray cluster has no GPU for tensors on cuda: start it with --num-gpus"):
        actor_pool.get("cuda", 1)


ON_A_GPU = """
from tests.mps import emulator
emulator.start()
import torch
from tests.oracle import GRADIENT_TOLERANCE, TOLERANCE, Sizes, assert_close, draw, weigh
from torch_xlstm_ops import config, mlstm_chunkwise
from torch_xlstm_ops.schedules.ray import actor_pool

class LocalPool:  # runs tasks here, on the host
    def remote(self, work):
        def run(tensors):
            assert {t.device.type for t in tensors} == {"cpu"}
            return work(list(tensors))
        return run

    def close(self):
        pass

asked = []
actor_pool.get = lambda device, size: asked.append(device) or LocalPool()
actor_pool.free = lambda device: 1
found, gradients = {}, {}
for device, name in (("cpu", "inductor"), ("mps", "ray")):
    args = [t.to(device).requires_grad_() for t in draw(Sizes(S=100))]
    with config.use(segment=32, heads_per_band=2):
        h, state = mlstm_chunkwise(*args, chunk_size=16, schedule=name)
    found[device] = [h, *state]
    gradients[device] = torch.autograd.grad(weigh([t.cpu() for t in found[device]]), args)
for results, tolerance in ((found, TOLERANCE), (gradients, GRADIENT_TOLERANCE)):
    assert {t.device.type for t in results["mps"]} == {"mps"}
    assert_close([t.cpu() for t in results["mps"]], results["cpu"], tolerance[torch.float32])
assert asked == ["mps", "mps"]
"""


@pytest.mark.slow
def test_threads_that_submit_tasks_of_a_gpu_use_the_host_only():
    from tests.mps.emulator import missing

    if reason := missing():
        pytest.skip(reason)
    environment = {**os.environ, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    subprocess.run([sys.executable, "-c", ON_A_GPU], env=environment, cwd=Path(__file__).parents[1], check=True,
                   timeout=500)


def test_without_ray_the_reason_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert schedules.unavailable(Schedule.RAY, torch.device("cpu")) == (
        'ray is not installed: run pip install -e ".[ray]" in a checkout of torch_xlstm_ops'
    )
    with pytest.raises(NotImplementedError, match=r"got ray .ray is not installed"):
        call(draw(Sizes()))


def test_a_cluster_that_is_not_there_is_an_error_in_time(monkeypatch):
    began = time.monotonic()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(RuntimeError, match=r"ray_address must be .* got 127.0.0.1:\d+: .*refused"):
            cluster.check_reachable(f"127.0.0.1:{free.getsockname()[1]}")
        free.listen()  # and never answers
        monkeypatch.setattr(cluster, "SECONDS", 1.0)
        with pytest.raises(RuntimeError, match="did not answer in 1 s"):
            cluster.check_reachable(f"127.0.0.1:{free.getsockname()[1]}")
    assert time.monotonic() - began < 15


ALONE = """
import sys, time, torch
from torch_xlstm_ops import mlstm_chunkwise
from torch_xlstm_ops.parallel import Workers
from torch_xlstm_ops.parallel.state_link import StateLink
from torch_xlstm_ops.schedules import ray as schedule
from torch_xlstm_ops.schedules.queue.task_runner import TaskError
from torch_xlstm_ops.schedules.ray import actor_pool, cluster

MB = 2**18  # float32
answers = []

def refused(call):
    try:
        call()
    except RuntimeError as error:
        answers.append(str(error))
    else:
        answers.append("taken")

def work(chunk_size, kernels, args):
    q, k, v, *_, c, n, m = args
    if torch.isnan(q[0, 0, 0]):
        open("busy", "w").close()
        time.sleep(3600)
    return [torch.zeros(int(q[0, 0, 0]) * MB), c, n, m] if q[0, 0, 0] > 0 else [v.clone(), c, n, m]

schedule._forward_task = work

def call(first, S=8, D=8):
    q = torch.full((1, 1, S, D), float(first))
    gates = torch.zeros(1, 1, S)
    return mlstm_chunkwise(q, q, q, gates, gates, schedule="ray", chunk_size=8)

for _ in range(3):
    refused(lambda: call(0, S=65_536, D=128))
    refused(lambda: call(100))
refused(lambda: Workers(torch.nn.Linear(2048, 16_384, bias=False), 1, call=print))
refused(lambda: StateLink(None, 0, 0).store(3, [torch.zeros(100 * MB)]))
for _ in range(3):  # more than half of what there is
    until = time.monotonic() + 20  # Ray frees what is not needed a little later
    while True:
        try:
            call(0, S=32_768, D=128)
            break
        except TaskError:
            assert time.monotonic() < until
            time.sleep(0.1)
print(*answers, sep="\\n", file=open("answers", "w"), flush=True)
call(float("nan"))
"""


class Alone(NamedTuple):
    """A process with a Ray of its own, whose store is small and spills nowhere."""

    process: subprocess.Popen[str]
    mark: str  # in the environment of all that it starts
    folder: Path


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Alone]:
    mark, folder = f"XLSTM_TEST_MARK={os.getpid()}-{time.time_ns()}", tmp_path_factory.mktemp("alone")
    environment = {
        **os.environ, **dict([mark.split("=")]), "PYTHONPATH": str(Path(__file__).parents[1]),
        "XLSTM_OPS_WORKERS": "1", "XLSTM_OPS_SEGMENT": "65536", "RAY_AUTH_MODE": "disabled",
        "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(80 << 20), "RAY_local_fs_capacity_threshold": "0",
    }
    environment.pop("RAY_ADDRESS", None)
    process = subprocess.Popen([sys.executable, "-c", ALONE], env=environment, cwd=folder, stderr=subprocess.PIPE,
                               text=True)
    until = time.monotonic() + 240
    try:
        while not (folder / "busy").exists():
            assert process.poll() is None, process.communicate(timeout=60)[1]
            assert time.monotonic() < until
            time.sleep(0.1)
        yield Alone(process, mark, folder)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=60)
        finally:
            process.kill()
            for pid in marked(mark):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_full_object_store_is_an_error_that_names_the_object_and_leaves_nothing_stored(alone):
    answers = (alone.folder / "answers").read_text().splitlines()
    said = "\n".join(dict.fromkeys(answers)).replace(": ", ":\n")
    assert len(answers) == 8
    assert_expected_inline(said, """\
task (band 0, segment 0) of the ray schedule failed:
RuntimeError:
Ray's object store has no room for the tensors of a task (96.6 MB):
it and the disk it spills to are full; start Ray with a larger object store
task (band 0, segment 0) of the ray schedule failed:
RuntimeError:
Ray's object store has no room for the results of a task, beside its tensors (0.0 MB):
it and the disk it spills to are full; start Ray with a larger object store
Ray's object store has no room for the model (128.0 MB):
it and the disk it spills to are full; start Ray with a larger object store
Ray's object store has no room for the state after layer 3 (100.0 MB):
it and the disk it spills to are full; start Ray with a larger object store""")


@pytest.mark.slow
def test_an_interrupt_leaves_no_process(alone):
    alone.process.send_signal(signal.SIGINT)
    _, err = alone.process.communicate(timeout=60)
    assert "KeyboardInterrupt" in err
    until = time.monotonic() + 30
    while (left := marked(alone.mark)) and time.monotonic() < until:
        time.sleep(0.2)
    assert not left
