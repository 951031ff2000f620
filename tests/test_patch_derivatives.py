"""Laws of derivatives through patched packages: equal to those of the same computation in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from tests.oracle import GRADIENT_TOLERANCE, Sizes, assert_close, draw
from tests.parameters import tail
from torch_xlstm_ops.patch import patch

pytestmark = pytest.mark.usefixtures("one_thread")
Function = Callable[..., Tensor]
STEP = 1e-6  # of finite differences


def normal(*size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size)), dtype=torch.float64)


def transformers() -> tuple[Function, list[Tensor]]:
    """Return the output of a block for hidden states."""
    pytest.importorskip("transformers", reason="needs the package transformers")
    from tests.test_patch_transformers import build

    model = build(torch.float64, num_hidden_layers=1, hidden_size=32, mode="train", return_last_states=True,
                  norm_reduction_force_float32=False)
    block = model.backbone.blocks[0]  # the last norm and the logits are float32 whatever the dtype of the model
    return lambda x: block(x, None)[0], [normal(2, 5, 32)]


def mlstm_kernels() -> tuple[Function, list[Tensor]]:
    backend = pytest.importorskip("mlstm_kernels.torch.backend_module", reason="needs the package mlstm_kernels")
    module = backend.mLSTMBackend(backend.mLSTMBackendConfig(chunk_size=16, mode="train", return_last_states=False))
    args = draw(Sizes(B=1, NH=2, S=5), torch.float64, state=False)
    return lambda *given: module(**dict(zip("qkvif", given, strict=True))), args


def xlstm_mlstm() -> tuple[Function, list[Tensor]]:
    cells = pytest.importorskip("xlstm.blocks.mlstm.cell", reason="needs the package xlstm")
    cell = cells.mLSTMCell(cells.mLSTMCellConfig(context_length=8, embedding_dim=16, num_heads=2)).double()
    return cell, [normal(1, 5, 16), normal(1, 5, 16) + 1, normal(1, 5, 16) - 1]


def xlstm_slstm() -> tuple[Function, list[Tensor]]:
    cells = pytest.importorskip("xlstm.blocks.slstm.cell", reason="needs the package xlstm")
    config = cells.sLSTMCellConfig(hidden_size=8, num_heads=2, backend="vanilla", dtype="float32")
    cell = cells.sLSTMCell(config).double()
    return lambda x: cell(x)[0], [normal(2, 4, 32)]


def flashrnn() -> tuple[Function, list[Tensor]]:
    peer = pytest.importorskip("flashrnn", reason="needs the package flashrnn")

    def run(x: Tensor, r: Tensor, b: Tensor) -> Tensor:
        h: Tensor = peer.flashrnn(x, r, b, function="slstm", backend="vanilla", dtype="float32")[0]
        return h[0]  # c, n and m of tokens before the last are NaN

    return run, [normal(2, 4, 4, 2, 4), normal(4, 2, 4, 4) / 4, normal(4, 2, 4)]


def tirex2_layer(kind: str) -> tuple[Function, list[Tensor]]:
    """Return one layer of a tirex-2 model, over its hidden states."""
    pytest.importorskip("tirex2.model.tirex2", reason="needs the package tirex-2")
    from tests.test_patch_tirex import tirex2_model

    layer = next(m for m in tirex2_model().modules() if type(m).__name__ == kind).double()
    for module in layer.modules():
        if hasattr(module, "force_float32_reductions"):
            module.force_float32_reductions = False
    return layer, [normal(1, 5, 64)]


def tirex2_mlstm() -> tuple[Function, list[Tensor]]:
    return tirex2_layer("mLSTMLayer")


def tirex2_slstm() -> tuple[Function, list[Tensor]]:
    return tirex2_layer("sLSTMFlashRNNLayer")


PACKAGES: dict[str, tuple[str, Callable[[], Any]]] = {
    "transformers": ("transformers", transformers),
    "mlstm_kernels": ("mlstm_kernels", mlstm_kernels),
    "xlstm mLSTM": ("xlstm", xlstm_mlstm),
    "xlstm sLSTM": ("xlstm", xlstm_slstm),
    "flashrnn": ("flashrnn", flashrnn),
    "tirex-2 mLSTM": ("tirex-2", tirex2_mlstm),
    "tirex-2 sLSTM": ("tirex-2", tirex2_slstm),
}
QUICK = ("xlstm sLSTM", "flashrnn")
every_package = pytest.mark.parametrize("package", tail(PACKAGES, QUICK.__contains__))


@every_package
def test_first_and_second_derivatives_pass_gradcheck(package: str) -> None:
    name, build = PACKAGES[package]
    function, args = build()
    leaves = [t.requires_grad_() for t in args]
    with patch(name):
        assert gradcheck(function, leaves, fast_mode=True)
        assert gradgradcheck(function, leaves, fast_mode=True)


@every_package
def test_a_tangent_equals_finite_differences(package: str) -> None:
    name, build = PACKAGES[package]
    function, args = build()
    directions = [torch.randn_like(t) for t in args]
    with patch(name), torch.no_grad():
        _, found = torch.func.jvp(function, tuple(args), tuple(directions))
        ahead, behind = (
            function(*[t + sign * STEP * d for t, d in zip(args, directions, strict=True)]) for sign in (1, -1)
        )
    torch.testing.assert_close(found, (ahead - behind) / (2 * STEP), rtol=1e-5, atol=1e-7)


@every_package
def test_gradients_of_each_sample_equal_a_loop(package: str) -> None:
    name, build = PACKAGES[package]
    function, args = build()
    samples = torch.stack([args[0], args[0] * 0.5])
    with patch(name):
        mapped = torch.func.vmap(torch.func.grad(lambda x: function(x, *args[1:]).sin().sum()))(samples)
        looped = [torch.func.grad(lambda x: function(x, *args[1:]).sin().sum())(x) for x in samples]
    torch.testing.assert_close(mapped, torch.stack(looped))


def test_gradients_of_each_sample_by_functional_call_equal_those_unpatched() -> None:
    cells = pytest.importorskip("xlstm.blocks.slstm.cell", reason="needs the package xlstm")
    config = cells.sLSTMCellConfig(hidden_size=8, num_heads=2, backend="vanilla", dtype="float32")
    cell = cells.sLSTMCell(config).double()
    weights, x = dict(cell.named_parameters()), normal(3, 1, 4, 32)

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(cell, weights, (x,))[0]
        return found.square().sum()

    with patch("xlstm"):
        found = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x)
    for name, gradient in found.items():
        wanted = [torch.autograd.grad(loss(weights, one), weights[name])[0] for one in x]
        torch.testing.assert_close(gradient, torch.stack(wanted))


def test_derivatives_of_a_tirex_cell_equal_those_of_the_float64_recurrence() -> None:
    """The peer computes in bfloat16 whatever it is given, so its inputs are rounded first."""
    pytest.importorskip("tirex.models.slstm.cell", reason="needs the package tirex-ts")
    from tests.test_patch_tirex import cell_input, exact, tirex_cell

    cell, x = tirex_cell(), cell_input().bfloat16().float()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).bfloat16().float()

    def loss(run: Function, x: Tensor) -> Tensor:
        return run(x).double().sin().sum()

    def found(run: Function, x: Tensor, direction: Tensor) -> list[Tensor]:
        gradient = torch.func.grad(functools.partial(loss, run))
        tangent = torch.func.jvp(run, (x,), (direction,))[1]
        return [gradient(x), tangent, torch.func.jvp(gradient, (x,), (direction,))[1]]

    with patch("tirex"):
        ours = found(lambda x: cell(x, None)[0], x, direction)
    wanted = found(lambda x: exact(cell, x), x.double(), direction.double())
    assert_close(ours, wanted, GRADIENT_TOLERANCE[torch.bfloat16])
