"""Laws of raw callables: one compile for each family, for all threads and free sizes."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from tests import oracle
from tests.parameters import tail
from torch_xlstm_ops import config, mlstm_chunkwise, slstm_sequence
from torch_xlstm_ops.runtime import compiler, state, torch_internals


def scale(x, y, *, factor):
    return (torch.exp(-x.abs()) * factor + y.sum(-1, keepdim=True),)


AXES = ("G NC D", "G NC D")


@pytest.fixture
def compiles(monkeypatch):
    """Count compiles, from an empty cache."""
    compiler.clear()
    count = []
    original = compiler._compile
    monkeypatch.setattr(compiler, "_compile", lambda *args: count.append(args[3]) or original(*args))
    yield count
    compiler.clear()


def draw(G, NC, D=8, dtype=torch.float32):
    return [torch.randn(G, NC, D, dtype=dtype) for _ in range(2)]


@pytest.mark.smoke
def test_free_sizes_share_one_compile(compiles):
    for G, NC in [(1, 1), (1, 7), (5, 1), (3, 4), (64, 33)]:
        args = draw(G, NC)
        (found,) = compiler.get(scale, AXES, args, factor=2.0)(list(args))
        torch.testing.assert_close(found, scale(*args, factor=2.0)[0])
    assert len(compiles) == 1


@pytest.mark.parametrize("schedule", tail(["inductor", "queued"]))
def test_lengths_and_batches_of_an_mlstm_share_its_compiles(compiles, schedule):
    for B, S in [(2, 19), (1, 16), (3, 100), (2, 64), (1, 70)]:
        args = [t.requires_grad_() for t in oracle.draw(oracle.Sizes(B=B, S=S))]
        with config.use(segment=32, heads_per_band=2 if schedule == "inductor" else 9):
            h, state = mlstm_chunkwise(*args, chunk_size=16, schedule=schedule)
        torch.autograd.grad(oracle.weigh([h, *state]), args)
    assert len(compiles) >= 2  # forth and back
    assert all(compiles)  # with sizes left free


def test_lengths_and_batches_of_an_slstm_share_its_compiles(compiles):
    for B, S in [(1, 7), (2, 40), (3, 33)]:
        x, r, b = torch.randn(B, S, 4, 2, 4), torch.randn(4, 2, 4, 4), torch.randn(4, 2, 4)
        args = [t.requires_grad_() for t in (x, r, b)]
        torch.autograd.grad(slstm_sequence(*args)[0].sum(), args)
    assert len(compiles) <= 8


def test_what_a_kernel_is_specialised_on_is_in_the_key(compiles):
    calls = [(draw(2, 2), 2.0), (draw(2, 2, D=9), 2.0), (draw(2, 2, dtype=torch.float64), 2.0), (draw(2, 2), 3.0)]
    for args, factor in calls:
        (found,) = compiler.get(scale, AXES, args, factor=factor)(list(args))
        torch.testing.assert_close(found, scale(*args, factor=factor)[0])
    assert len(compiles) == 4


def test_another_number_of_threads_is_another_kernel(compiles):
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            args = draw(8, 64)
            (found,) = compiler.get(scale, AXES, args, factor=2.0)(list(args))
            torch.testing.assert_close(found, scale(*args, factor=2.0)[0])
    finally:
        torch.set_num_threads(before)
    assert len(compiles) == 2


def test_threads_that_race_compile_once(compiles):
    args, found, start = draw(3, 5), [], threading.Barrier(4)

    def ask():
        start.wait(60)
        found.append(compiler.get(scale, AXES, args, factor=2.0))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert len(compiles) == 1
    assert len(set(map(id, found))) == 1


def test_sizes_that_the_compiler_excludes_get_their_own_compile(compiles, monkeypatch):
    def limited(*args):
        call, admits = original(*args)
        return call, lambda sizes: sizes["NC"] < 10 and admits(sizes)

    original = compiler._compile
    monkeypatch.setattr(compiler, "_compile", limited)
    for NC in (4, 20):
        args = draw(2, NC)
        (found,) = compiler.get(scale, AXES, args, factor=2.0)(list(args))
        torch.testing.assert_close(found, scale(*args, factor=2.0)[0])
    assert [bool(free) for free in compiles] == [True, False]


def test_caches_are_bounded(compiles, monkeypatch):
    monkeypatch.setattr(compiler._callables, "capacity", 3)
    for NC in range(1, 9):
        args = draw(1, NC)
        compiler.get(scale, AXES, args, factor=2.0)
    assert len(compiler._callables) == 3
    assert len(compiles) == 1


def test_compiling_inside_other_modes(compiles):
    args = draw(2, 3)
    with torch.inference_mode(), torch.autocast("cpu"), torch.device("meta"):
        (found,) = compiler.get(scale, AXES, args, factor=2.0)(list(args))
    torch.testing.assert_close(found.clone(), scale(*args, factor=2.0)[0])


def test_relaxed_arithmetic_of_mps_is_refused_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    state._told.clear()
    monkeypatch.setenv("PYTORCH_MPS_FAST_MATH", "1")
    compiler._refuse_fast_math(torch.device("cpu"))
    with pytest.warns(RuntimeWarning, match="PYTORCH_MPS_FAST_MATH is set: .* unset it"):
        compiler._refuse_fast_math(torch.device("mps"))
    state._told.clear()
    monkeypatch.setenv("PYTORCH_MPS_FAST_MATH", "0")
    compiler._refuse_fast_math(torch.device("mps"))


def steps(x: Tensor, y: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """Return results of several steps, joined once and twice, and the last one; each step reads those before it."""
    rows, pairs = [], []
    shifted = torch.cat([torch.zeros_like(y[:, :1]), y[:, :-1]], 1)
    for k in range(x.shape[2]):
        y = torch.where(mask == k, 0.0, torch.sigmoid(y) * x[:, :, k] + torch.exp(-y.abs()) + shifted)
        rows.append(y.unsqueeze(2))
        pairs.append(torch.cat([(y + k).unsqueeze(2), (2 * y).unsqueeze(2)], 2).unsqueeze(0))
    return torch.cat(rows, 2), torch.cat(pairs, 0), y


STEPS = ["G NC K D", "G NC D", "G NC D"]


def drawn_steps() -> list[Tensor]:
    return [torch.randn(3, 5, 6, 4), torch.randn(3, 5, 4), torch.randint(9, (3, 5, 4))]


@pytest.mark.parametrize("free", [compiler.FREE_AXES, {}], ids=["symbolic", "fixed"])
def test_unrolled_steps_are_one_kernel(free: dict[str, int]) -> None:
    from torch._inductor import metrics

    args, before = drawn_steps(), metrics.generated_kernel_count
    options = {"fx_graph_cache": False}
    call, _ = torch_internals.compile_raw(steps, [a.split() for a in STEPS], args, free, options, {}, unrolled=True)
    assert metrics.generated_kernel_count == before + 1
    for found, wanted in zip(call(list(args)), steps(*args), strict=True):
        assert found.is_contiguous()
        torch.testing.assert_close(found, wanted)


def test_steps_that_inductor_refuses_compile_as_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    need = torch_internals.NEEDS["steps_as_one_kernel"]
    monkeypatch.setattr(need, "moved", None)
    monkeypatch.setattr(need, "run", need)

    def changed(self: object, *args: object) -> None:
        raise TypeError("store_output takes other arguments")

    refused = torch_internals.inductor_steps._stores()
    monkeypatch.setattr(torch_internals.inductor_steps, "_stores", lambda: refused)
    monkeypatch.setattr(refused, "store_output", changed)
    args = drawn_steps()
    with pytest.warns(RuntimeWarning, match="takes other arguments.*: functions of the sLSTM .* take longer"):
        call, _ = torch_internals.compile_raw(
            steps, [a.split() for a in STEPS], args, {}, {"fx_graph_cache": False}, {}, unrolled=True
        )
    for found, wanted in zip(call(list(args)), steps(*args), strict=True):
        torch.testing.assert_close(found, wanted)


def test_other_threads_compile_as_usual_beside_unrolled_steps() -> None:
    from torch._inductor import graph, ir, lowering

    def changed() -> list[object]:
        return [graph.GraphLowering.run_node, ir.StorageBox.mark_reuse, lowering.lowerings[torch.ops.aten.cat.default]]

    args, before, found = drawn_steps(), changed(), []

    def compile_here() -> None:
        found.extend(torch.compile(steps, options={"fx_graph_cache": False})(*args))

    with torch_internals.steps_as_one_kernel():
        thread = threading.Thread(target=compile_here)
        thread.start()
        thread.join(120)
    assert not thread.is_alive()
    assert changed() == before
    for one, wanted in zip(found, steps(*args), strict=True):
        torch.testing.assert_close(one, wanted)
