"""Laws of the Dynamo backend, with our own operators and with transformers' own code."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from torch_xlstm_ops.registrations.dynamo import backend, splice

import torch_xlstm_ops
from tests.oracle import GRADIENT_TOLERANCE, TOLERANCE, Sizes, assert_close, draw, exact, weigh
from tests.parameters import tail
from torch_xlstm_ops import config

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def compiled(fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(fn, backend="xlstm", fullgraph=True, options=options)


def chunkwise(*args: Tensor) -> tuple[Tensor, ...]:
    h, state = torch_xlstm_ops.mlstm_chunkwise(*args)
    return h, *state


def step(*args: Tensor) -> tuple[Tensor, ...]:
    h, state = torch_xlstm_ops.mlstm_step(*args)
    return h, *state


def step_args(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    q, k, v, igate, fgate, *state = draw(Sizes(S=1), dtype)
    return [q[:, :, 0], k[:, :, 0], v[:, :, 0], igate, fgate, *state]


def gradients(fn: Callable[..., tuple[Tensor, ...]], args: list[Tensor]) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in args]
    return list(torch.autograd.grad(weigh(fn(*leaves)), leaves))


# --- finding the backend ---


@pytest.mark.smoke
def test_the_backend_is_found_by_name_without_importing_us():
    check = """
import sys, torch
assert "xlstm" in torch._dynamo.list_backends()
assert "torch_xlstm_ops" not in sys.modules
f = torch.compile(lambda x: x + 1, backend="xlstm")
assert "torch_xlstm_ops" in sys.modules
"""
    subprocess.run([sys.executable, "-c", check], check=True, timeout=120)


# --- splicing ---


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.smoke
@pytest.mark.parametrize("inlined", [True, False])
@pytest.mark.parametrize("dtype", tail([torch.float32, torch.bfloat16]))
@pytest.mark.parametrize("S", tail([19, 128]))
def test_a_compiled_sequence_equals_the_recurrence(inlined: bool, dtype: torch.dtype, S: int):
    args = draw(Sizes(S=S), dtype)
    assert_close(compiled(chunkwise, inline=inlined)(*args), exact(args), TOLERANCE[dtype])


@pytest.mark.slow
def test_inlined_segments_pass_the_state_on():
    args = draw(Sizes(B=1, NH=1, S=70 * 2 + 1))
    assert_close(compiled(chunkwise, inline=True, chunk_size=2)(*args), exact(args), TOLERANCE[torch.float32])


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("inlined", tail([False, True]))
def test_a_sequence_without_a_state_starts_from_zeros(inlined: bool):
    args = draw(Sizes(), state=False)
    assert_close(compiled(chunkwise, inline=inlined)(*args), exact(args), TOLERANCE[torch.float32])


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.slow
@pytest.mark.parametrize("fn", [chunkwise, step])
def test_gradients_of_inlined_mathematics_equal_the_operators(fn: Callable[..., tuple[Tensor, ...]]):
    args = step_args() if fn is step else draw(Sizes())
    spliced = gradients(compiled(fn, inline=True), args)
    assert_close(spliced, gradients(fn, args), GRADIENT_TOLERANCE[torch.float32])


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.smoke
def test_gradients_of_calls_equal_the_operators():
    args = draw(Sizes())
    assert_close(gradients(compiled(chunkwise, inline=False), args), gradients(chunkwise, args), 1e-6)


def slstm_step(*args: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch_xlstm_ops.slstm_step(*args))


def test_an_slstm_step_is_inlined_with_its_gradients():
    B, NH, DH = 2, 2, 4
    args = [torch.randn(B, 4, NH, DH), torch.randn(4, NH, DH, DH), torch.randn(4, NH, DH), torch.randn(B, NH, DH),
            torch.randn(B, NH, DH), torch.rand(B, NH, DH) + 0.5, torch.randn(B, NH, DH)]
    assert "inlined" in torch_xlstm_ops.explain(slstm_step, *args)
    assert_close(compiled(slstm_step)(*args), slstm_step(*args), TOLERANCE[torch.float32])
    assert_close(gradients(compiled(slstm_step), args), gradients(slstm_step, args), GRADIENT_TOLERANCE[torch.float32])


@pytest.mark.parametrize("inlined", [True, False])
def test_a_step_in_place_writes_its_states(inlined: bool):
    q, k, v, igate, fgate, *state = step_args()

    def advance(*args: Tensor) -> Tensor:
        return torch_xlstm_ops.mlstm_step_(*args) * 2

    wanted = step(q, k, v, igate, fgate, *state)
    h = compiled(advance, inline=inlined)(q, k, v, igate, fgate, *state)
    assert_close([h / 2, *state], wanted, TOLERANCE[torch.float32])


def test_a_step_in_place_is_refused_where_autograd_records():
    args = [t.requires_grad_() for t in step_args()]
    with pytest.raises(Exception, match="mlstm_step_ is in place and not differentiable"):
        compiled(torch_xlstm_ops.mlstm_step_)(*args)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.slow
def test_a_call_by_keywords_is_inlined():
    names = ("q", "k", "v", "igate", "fgate", "c", "n", "m")

    def call(*args: Tensor) -> Any:
        return torch.ops.xlstm.mlstm_chunkwise(**dict(zip(names, args, strict=True)))

    args = draw(Sizes())
    assert operators(call, args) == []
    assert_close(compiled(call)(*args), exact(args), TOLERANCE[torch.float32])


@pytest.mark.smoke
def test_one_inlined_graph_serves_any_batch():
    fn = torch.compile(step, backend="xlstm", fullgraph=True, dynamic=True)
    for B in (2, 3, 5):
        q, k, v, igate, fgate, *state = draw(Sizes(B=B, S=1))
        args = [q[:, :, 0], k[:, :, 0], v[:, :, 0], igate, fgate, *state]
        assert_close(fn(*args), step(*args), TOLERANCE[torch.float32])
    assert counters["stats"]["unique_graphs"] == 1


def test_under_autocast_a_call_keeps_the_operators_dtypes():
    args = step_args()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted, found = step(*args), compiled(step)(*args)
    assert [t.dtype for t in found] == [t.dtype for t in wanted]
    assert_close(found, wanted, TOLERANCE[torch.bfloat16])


def operators(fn: Callable[..., Any], args: list[Tensor], **options: Any) -> list[str]:
    """Return the operators that stay calls in the graph that goes to Inductor."""
    stay: list[str] = []

    def look(module: fx.GraphModule, examples: Any) -> Any:
        calls = backend.prepare(module, backend.parse_options(options, None))
        stay.extend(str(splice.operator_of(node)) for node in calls)
        return module

    torch.compile(fn, backend=look, fullgraph=True)(*args)
    return stay


@pytest.mark.slow
@pytest.mark.usefixtures("small_chunks")
def test_by_default_steps_and_short_sequences_without_gradients_are_inlined():
    short, long = draw(Sizes()), draw(Sizes(B=1, NH=4, S=1100, DHQK=128, DHHV=128), state=False)
    assert operators(step, step_args()) == []
    assert operators(chunkwise, short) == []
    assert operators(chunkwise, long) == ["mlstm_chunkwise"]
    assert operators(chunkwise, short, schedule="recurrent") == ["mlstm_chunkwise"]
    assert operators(chunkwise, [t.requires_grad_() for t in draw(Sizes())]) == ["mlstm_chunkwise"]


@pytest.mark.usefixtures("small_chunks")
def test_the_option_inline_inlines_all_calls_or_none():
    learning = [t.requires_grad_() for t in draw(Sizes())]
    assert operators(chunkwise, learning, inline=True) == []
    assert operators(chunkwise, draw(Sizes()), inline=False) == ["mlstm_chunkwise"]
    assert operators(step, step_args(), inline=False) == ["mlstm_step"]


# --- options ---


def test_settings_hold_while_compiled_code_runs_forward_and_backward(monkeypatch: pytest.MonkeyPatch):
    from torch_xlstm_ops.schedules import plan

    made: list[config.Config] = []
    make = plan.make
    monkeypatch.setattr(plan, "make", lambda shape, device, cfg, machine, **how: made.append(cfg) or make(
        shape, device, cfg, machine, **how))
    fn = compiled(chunkwise, inline=False, chunk_size=16, segment=32, schedule="inductor")
    gradients(fn, draw(Sizes(S=70)))
    assert len(made) == 2  # forward and backward
    assert {(cfg.chunk_size, cfg.segment, str(cfg.schedule)) for cfg in made} == {(16, 32, "inductor")}
    made.clear()
    with config.use(chunk_size=16):
        gradients(compiled(chunkwise, inline=False), draw(Sizes(S=70)))
    assert {(cfg.chunk_size, cfg.segment) for cfg in made} == {(16, None)}


@pytest.mark.parametrize(("options", "message"), [
    ({"chunksize": 64}, r"an option must be one of schedule, chunk_size, .*inline, or of .*list_options\(\), got 'chu"),
    ({"chunk_size": 0}, "option chunk_size must be a whole number of at least 1, got 0"),
    ({"schedule": "fast"}, "option schedule must be one of auto, inductor, .*got 'fast'"),
    ({"inline": "yes"}, "option inline must be True or False, got 'yes'"),
    ({"trace": "t.json"}, "an option must not be trace, which is process-wide"),
])
def test_bad_options_are_refused_at_once_by_name(options: dict[str, Any], message: str):
    with pytest.raises(BackendCompilerFailed, match=message):
        compiled(chunkwise, **options)(*draw(Sizes()))


@pytest.mark.slow
def test_options_are_not_changed_and_the_rest_go_to_inductor():
    options = {"inline": True, "epilogue_fusion": False, "chunk_size": 32}
    asked = backend.parse_options(options, None)
    assert asked == ({"chunk_size": 32}, True, {"epilogue_fusion": False})
    assert options == {"inline": True, "epilogue_fusion": False, "chunk_size": 32}
    assert backend.parse_options(None, "max-autotune-no-cudagraphs").inductor["max_autotune"] is True
    args = draw(Sizes())
    assert_close(compiled(chunkwise, **options)(*args), exact(args), TOLERANCE[torch.float32])


def test_a_bad_mode_is_refused_by_torch():
    with pytest.raises(BackendCompilerFailed, match="Unrecognized mode"):
        torch.compile(chunkwise, backend="xlstm", mode="fastest")(*draw(Sizes()))


def test_mode_and_options_together_are_refused_by_torch():
    with pytest.raises(RuntimeError, match="Either mode or options can be specified"):
        torch.compile(chunkwise, backend="xlstm", mode="default", options={"inline": True})


def test_a_model_without_xlstm_is_compiled_with_one_warning():
    model, x = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()), torch.randn(3, 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = torch.compile(model, backend="xlstm")(x)
    (warning,) = [w for w in caught if "xlstm" in str(w.message)]
    assert "found no xLSTM in this graph" in str(warning.message)
    torch.testing.assert_close(found, model(x))


def test_pieces_around_a_graph_break_do_not_warn():
    def fn(x: Tensor, *args: Tensor) -> Tensor:
        y = x.sin()
        torch._dynamo.graph_break()
        return step(*args)[0] + y.sum()

    args = step_args()
    found = torch.compile(fn, backend="xlstm")(torch.ones(3), *args)
    torch.testing.assert_close(found, fn(torch.ones(3), *args), rtol=1e-5, atol=1e-5)
