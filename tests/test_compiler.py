"""Laws of raw callables: one compile for each family, for all threads and free sizes."""

from __future__ import annotations

import threading

import pytest
import torch

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


@pytest.mark.parametrize("joined", [3, 5])
def test_tensors_are_joined_in_place_where_inductor_has_no_option_for_it(monkeypatch, joined):
    from torch._inductor import config as inductor
    from torch._inductor import ir, lowering

    def join(x, y):
        return (torch.stack([torch.exp(x) * k + y for k in range(joined)], 1),)

    known, created, cat = inductor.get_config_copy(), [], torch.ops.aten.cat.default
    known.pop("max_complex_pointwise_cat_inputs", None)
    monkeypatch.setattr(inductor.__class__, "get_config_copy", lambda self: known)
    create = ir.ConcatKernel.create
    monkeypatch.setattr(ir.ConcatKernel, "create", lambda *args: created.append(len(args[0])) or create(*args))

    def lower(tensors, dim=0):  # as Inductor does on CUDA with up to 8 tensors
        return lowering.pointwise_cat(tensors, dim)

    monkeypatch.setitem(lowering.lowerings, cat, lower)
    args = draw(3, 4)
    options = {"max_pointwise_cat_inputs": 3, "fx_graph_cache": False}
    call, _ = torch_internals.compile_raw(join, [["G", "NC", "D"]] * 2, args, {}, options, {})
    torch.testing.assert_close(call(list(args))[0], join(*args)[0])
    assert created == [joined] * (joined > 3)
    assert lowering.lowerings[cat] is lower
