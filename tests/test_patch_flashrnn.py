"""Laws of the flashrnn drop-in, compared with the package's vanilla backend."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.oracle import assert_close, weigh
from torch_xlstm_ops.patch import patch

pytest.importorskip("flashrnn", reason="needs the package flashrnn")

from flashrnn import FlashRNNConfig, flashrnn

B, T, NH, DH = 2, 6, 2, 4  # NH, DH of test_slstm: each new pair is a compile
BACKENDS = ["vanilla", "vanilla_fwbw", "cuda", "cuda_fused", "triton_fused"]


def arguments(dtype: torch.dtype = torch.float32, state: bool = False) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    sizes = [(B, T, 4, NH, DH), (4, NH, DH, DH), (4, NH, DH)] + [(4, B, 1, NH, DH)] * state
    args = [torch.randn(size, generator=g).to(dtype) for size in sizes]
    args[1] /= 4
    if state:
        args[3][2] = args[3][2].abs() + 1
    return args


def run(backend: str, args: list[Tensor], function: str = "slstm") -> tuple[Tensor, Tensor]:
    h, last = flashrnn(*args, function=function, backend=backend, dtype="float32")
    return h, last


@pytest.mark.smoke
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_equals_vanilla(backend: str, state: bool) -> None:
    h, last = run("vanilla", arguments(state=state))
    with patch("flashrnn"):
        found, found_last = run(backend, arguments(state=state))
    assert found.shape == h.shape
    assert found_last.shape == last.shape
    assert_close([found[0], found_last], [h[0], last], 1e-5)
    assert_close([found[:, :, -1:]], [h[:, :, -1:]], 1e-5)


def test_unknown_states_are_nan() -> None:
    with patch("flashrnn"):
        h, _ = run("vanilla", arguments())
    assert h[1:, :, :-1].isnan().all()
    assert not h[0].isnan().any()


def test_a_sequence_may_be_cut_anywhere() -> None:
    x, r, b = arguments()
    with patch("flashrnn"):
        whole, last = run("vanilla", [x, r, b])
        first, state = run("vanilla", [x[:, :2], r, b])
        second, after = run("vanilla", [x[:, 2:], r, b, state])
    assert_close([torch.cat([first[0], second[0]], 1), after], [whole[0], last], 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_last_states_have_the_inputs_dtype_as_in_flashrnn(dtype: torch.dtype) -> None:
    args = arguments(dtype)
    theirs = run("vanilla", args)[1].dtype
    with patch("flashrnn"):
        assert run("vanilla", args)[1].dtype == theirs == dtype


def test_float32_states_stay_float32() -> None:
    x, r, b, state = (t.bfloat16() for t in arguments(state=True))
    with patch("flashrnn"):
        last = run("vanilla", [x, r, b, state.float()])[1]
        rounded = run("vanilla", [x, r, b, state])[1]
    assert last.dtype == torch.float32
    assert torch.equal(last.bfloat16(), rounded)
    assert not torch.equal(last, rounded.float())


@pytest.mark.smoke
def test_gradients_equal_vanilla() -> None:
    def gradients() -> list[Tensor]:
        leaves = [t.requires_grad_() for t in arguments(torch.float64, state=True)]
        config = FlashRNNConfig(backend="vanilla", function="slstm", num_heads=NH, head_dim=DH, hidden_dim=NH * DH)
        h, last = flashrnn(*leaves, config=config)
        weigh([h[0], last]).backward()
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    theirs = gradients()
    with patch("flashrnn"):
        assert_close(gradients(), theirs, 1e-9)


@pytest.mark.parametrize("function", ["lstm", "gru", "elman"])
def test_other_functions_are_not_replaced(function: str) -> None:
    gates = {"lstm": 4, "gru": 3, "elman": 1}[function]
    x, r, b = arguments()
    args = [x[:, :, :gates], r[:gates], b[:4 if function == "gru" else gates]]
    theirs = run("vanilla", args, function)
    with patch("flashrnn"):
        assert all(torch.equal(a, b) for a, b in zip(run("vanilla", args, function), theirs, strict=True))


def test_compat_replaces_nothing() -> None:
    theirs = run("vanilla", arguments())
    with patch("flashrnn", compat=True) as handle:
        assert handle.report() == ()
        assert all(torch.equal(a, b) for a, b in zip(run("vanilla", arguments()), theirs, strict=True))
