"""Laws of the tirex-ts and tirex-2 drop-ins, judged by the packages themselves and a float64 recurrence."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.oracle import assert_close, error
from torch_xlstm_ops.maths import slstm
from torch_xlstm_ops.patch import patch

CONFIG = {"num_blocks": 2, "embedding_dim": 64, "num_heads": 4}


def randomised(model: Any) -> Any:
    g = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=max(parameter.shape[-1], 16) ** -0.5, generator=g)
    return model.eval()


def series(batch: int, length: int) -> Tensor:
    return torch.sin(torch.arange(length) / 5 + torch.arange(batch)[:, None])


def tirex_cell(backend: str = "torch") -> Any:
    cell = pytest.importorskip("tirex.models.slstm.cell", reason="needs the package tirex-ts")
    return randomised(cell.sLSTMCell(cell.sLSTMBlockConfig(embedding_dim=32, num_heads=4), backend))


def cell_input() -> Tensor:
    return torch.randn(2, 40, 128, generator=torch.Generator().manual_seed(1))


def exact(cell: Any, x: Tensor) -> Tensor:
    """Return the float64 recurrence on the bfloat16 inputs and weights that the cell takes."""
    r = cell._recurrent_kernel_.bfloat16().double().view(4, 8, 4, 8).permute(2, 0, 3, 1)
    b = cell._bias_.double().view(4, 4, 8).transpose(0, 1)
    zeros = torch.zeros(4, 2, 4, 8, dtype=torch.float64)
    return slstm.recurrent(x.bfloat16().double().view(2, 40, 4, 4, 8), r, b, *zeros)[0].transpose(1, 2)


@pytest.mark.parametrize("backend", ["torch", "cuda"])
def test_tirex_cells_are_no_further_from_the_recurrence(backend: str) -> None:
    cell, x = tirex_cell(), cell_input()
    with torch.no_grad():
        wanted, theirs = exact(cell, x), cell(x, None)
        with patch("tirex"):
            ours = tirex_cell(backend)(x, None)
    assert [t.shape for t in ours] == [t.shape for t in theirs]
    assert [t.dtype for t in ours] == [t.dtype for t in theirs]
    assert error(ours[0], wanted) <= error(theirs[0], wanted) < 0.05


def test_tirex_states_carry_on() -> None:
    cell, x = tirex_cell(), cell_input()
    with torch.no_grad(), patch("tirex"):
        whole, last = cell(x, None)
        first, state = cell(x[:, :13], None)
        second, after = cell(x[:, 13:], state)
    assert_close([torch.cat([first, second], 2), after], [whole, last], 1e-3)  # y goes to R in bfloat16


def test_tirex_compat_leaves_it_alone() -> None:
    cell, x = tirex_cell(), cell_input()
    theirs = cell(x, None)[0]
    with patch("tirex", compat=True):
        assert torch.equal(cell(x, None)[0], theirs)


def tirex_model() -> Any:
    peer = pytest.importorskip("tirex.models.tirex", reason="needs the package tirex-ts")
    config = {"input_patch_size": 8, "output_patch_size": 8, "quantiles": [0.1, 0.5, 0.9], "block_kwargs": CONFIG,
              "input_ff_dim": 32}
    return randomised(peer.TiRexZero(backend="torch", model_config=config, train_ctx_len=64))


@pytest.mark.smoke
def test_tirex_forecasts_equal_unpatched() -> None:
    model = tirex_model()
    theirs = model.forecast(series(3, 50), prediction_length=20)[0]
    with patch("tirex"):
        assert_close([model.forecast(series(3, 50), prediction_length=20)[0]], [theirs], 2e-2)
    with patch(model):
        assert_close([model.forecast(series(3, 50), prediction_length=20)[0]], [theirs], 2e-2)
    assert torch.equal(model.forecast(series(3, 50), prediction_length=20)[0], theirs)


def test_tirex_models_under_their_own_compile_option_are_patched_too() -> None:
    model, x = tirex_model(), series(1, 50)
    with patch("tirex"):
        wanted = model.forecast(x, prediction_length=8)[0]
        for block in model.blocks:
            block.slstm_layer.slstm_cell._impl_forward_torch = None  # theirs would call it
        assert torch.equal(model.forecast(x, prediction_length=8)[0], wanted)


def tirex2_model() -> Any:
    peer = pytest.importorskip("tirex2.model.tirex2", reason="needs the package tirex-2")
    templates = {
        cell: {"time_mixer": {"model_type": f"bi-{cell}", "embedding_dim": 64, "num_heads": 4, "num_slstm_heads": 4},
               "variate_mixer": {"embedding_dim": 64, "num_heads": 4}, "dropout": 0.0, "eps": 1e-7}
        for cell in ("mlstm", "slstm")
    }
    return randomised(peer.TiRex2(
        stack_config={"templates": templates, "recipe": list(templates)}, num_blocks=2, embedding_dim=64,
        input_patch_size=8, output_patch_size=8, quantiles=[0.1, 0.5, 0.9],
        tokenizer_cfg={"output_patch_size": 8, "input_patch_size": 8, "input_patch_stride": 8}, scaler_cfg={},
        h_expand=2, context_len=64, future_len=16, input_ff_dim=32, act_func="SiLU", dropout=0.0,
        stack_out_norm_config={"eps": 1e-7}, device="cpu",
    ))


def forecasts(model: Any) -> list[Tensor]:
    """Return forecasts of a univariate series, and of one with past and known covariates, which run both ways."""
    from tirex2 import TimeseriesType

    waves = series(6, 64)
    alone = TimeseriesType(target=waves[:1, :50], past_covariates=None, future_covariates=None)
    beside = TimeseriesType(target=waves[1:3, :50], past_covariates=waves[3:4, :50], future_covariates=waves[4:, :60])
    found: list[Tensor] = model.predict([alone, beside], prediction_length=10)
    return found


@pytest.mark.smoke
def test_tirex2_forecasts_equal_unpatched() -> None:
    model = tirex2_model()
    theirs = forecasts(model)
    with patch("tirex-2") as handle:
        assert_close(forecasts(model), theirs, 1e-4)
        assert any("_FlashRNNLayer.recurrence" in line for line in handle.report())
    with patch(model) as handle:
        assert_close(forecasts(model), theirs, 1e-4)
        assert len(handle.report()) == 2  # its mLSTM and its sLSTM layers
        assert_close(forecasts(copy.deepcopy(model)), theirs, 1e-4)
    assert all(torch.equal(a, b) for a, b in zip(forecasts(model), theirs, strict=True))


def test_a_fork_whose_layers_call_flashrnn_themselves_has_that_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = pytest.importorskip("tirex2.model.component.flashrnn_slstm", reason="needs the package tirex-2")
    pytest.importorskip("flashrnn", reason="needs the package flashrnn")
    monkeypatch.delattr(layers._FlashRNNLayer, "recurrence")
    with patch("tirex2") as handle:
        assert any("flashrnn.flashrnn._get_kernel:" in line for line in handle.report())


def test_tirex2_layers_step_as_they_run() -> None:
    model = tirex2_model()
    (layer,) = {m for m in model.modules() if type(m).__name__ == "sLSTMFlashRNNLayer"}
    x, state, found = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(0)), None, []
    with torch.no_grad(), patch("tirex2"):
        whole = layer(x)
        for t in range(6):
            y, states = layer.step(x[:, t:t + 1], slstm_state=state)
            state = states["slstm_state"]
            found.append(y)
    assert_close([torch.cat(found, 1)], [whole], 1e-4)


@pytest.mark.slow
def test_tirex2_under_its_own_compile_option_follows_patch_and_removal() -> None:
    model = tirex2_model()
    theirs = forecasts(model)
    for layer in model.modules():
        if type(layer).__name__ in ("sLSTMFlashRNNLayer", "mLSTMLayer"):
            layer.compile(backend="eager")
    for _ in range(2):
        with patch("tirex2"):
            assert_close(forecasts(model), theirs, 1e-4)
        assert_close(forecasts(model), theirs, 1e-6)
