"""Laws of the forecasting packages' xLSTMs: neuralforecast's through xlstm's blocks, pytorch-forecasting's mLSTM."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torch_xlstm_ops.patch import convert_slstm_state_dict, patch

NO_LOG = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
pytestmark = pytest.mark.filterwarnings("ignore")  # of these packages and of what they import


def imported(name: str) -> Any:
    package = name.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs the package {package.replace('_', '-')}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


def randomised(module: nn.Module) -> Any:
    g = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=g, dtype=parameter.dtype), alpha=0.3)
    return module


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def results(module: nn.Module, *inputs: Any) -> list[Tensor]:
    """Return what a module returns, and the gradients of its weights."""
    module.zero_grad()
    y = module(*inputs)
    outputs = [y] if isinstance(y, Tensor) else [y[0], *y[1]]
    sum(t.sin().sum() for t in outputs).backward()  # type: ignore[union-attr]
    return [t.detach() for t in outputs] + [p.grad.clone() for p in module.parameters() if p.grad is not None]


def assert_equal(found: list[Tensor], wanted: list[Tensor], tolerance: float = 1e-10) -> None:
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def layer(**options: Any) -> Any:
    module = imported("pytorch_forecasting.layers._recurrent._mlstm.layer")
    return randomised(module.mLSTMLayer(8, 8, 2, **{"dropout": 0.0, **options}).double())


@pytest.mark.parametrize("layer_norm", [True, False])
def test_a_layer_of_pytorch_forecasting_equals_its_cells_token_by_token(layer_norm: bool) -> None:
    module, x, states = layer(layer_norm=layer_norm), drawn(40, 3, 8), drawn(3, 2, 3, 8)
    for inputs in ((x,), (x, *states)):
        wanted = results(module, *inputs)
        with patch("pytorch-forecasting"):
            assert_equal(results(module, *inputs), wanted)


def test_a_layer_of_pytorch_forecasting_in_pieces_equals_the_whole() -> None:
    module, x = layer(), drawn(40, 3, 8)
    with patch("pytorch-forecasting"), torch.no_grad():
        whole, after = module(x)
        first, state = module(x[:13])
        second, last = module(x[13:], *state)
    assert_equal([torch.cat([first, second]), *last], [whole, *after])


def test_hooks_of_cells_are_called_for_each_token() -> None:
    module, x, calls = layer(), drawn(5, 3, 8), []
    module.cells[0].register_forward_hook(lambda *args: calls.append(1))
    with patch("pytorch-forecasting"), torch.no_grad():
        module(x)
    assert len(calls) == 5


@pytest.mark.parametrize("kind", ["mlstm", "slstm"])
def test_xlstm_time_forecasts_the_same(kind: str) -> None:
    made = imported("pytorch_forecasting.models.xlstm").xLSTMTime(
        input_size=1, hidden_size=8, output_size=4, xlstm_type=kind, num_layers=2)
    model, x = randomised(made).eval(), {"encoder_cont": drawn(3, 40, 1).float()}
    with torch.no_grad():
        wanted = model(x).prediction
        with patch("pytorch-forecasting"):
            torch.testing.assert_close(model(x).prediction, wanted, rtol=1e-4, atol=1e-5)


def neural(backbone: str, steps: int = 0) -> Any:
    return imported("neuralforecast.models").xLSTM(
        h=6, input_size=24, backbone=backbone, encoder_hidden_size=32, encoder_dropout=0.0, max_steps=steps,
        windows_batch_size=16, accelerator="cpu", **NO_LOG)


def windows() -> dict[str, Any]:
    return {"insample_y": drawn(3, 24, 1), "futr_exog": None, "hist_exog": None, "stat_exog": None}


def test_neuralforecasts_mlstm_computes_the_same() -> None:
    model = randomised(neural("mLSTM").double())
    wanted = results(model, windows())
    with patch("xlstm"):
        assert_equal(results(model, windows()), wanted, 1e-3)  # the package's own rounds to float32


def test_neuralforecasts_slstm_computes_what_the_vanilla_backend_does(monkeypatch: pytest.MonkeyPatch) -> None:
    module, cells = imported("neuralforecast.models.xlstm"), imported("xlstm.blocks.slstm.layer")
    block, models = module.sLSTMBlockConfig, []
    for backend in ("cuda", "vanilla"):
        config = functools.partial(block, slstm=cells.sLSTMLayerConfig(backend=backend, dtype="float32"))
        monkeypatch.setattr(module, "sLSTMBlockConfig", config)
        with patch("xlstm"):  # without it the former needs CUDA
            models.append(neural("sLSTM"))
    ours, vanilla = models
    randomised(ours)
    vanilla.load_state_dict(convert_slstm_state_dict(ours.state_dict(), to="vanilla"))
    inputs = windows() | {"insample_y": windows()["insample_y"].float()}
    with patch("xlstm"):
        found = ours(inputs)
    torch.testing.assert_close(found, vanilla(inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_neuralforecast_trains_to_the_same_forecast() -> None:
    core, pandas = imported("neuralforecast"), imported("pandas")
    y = (torch.arange(120) / 5).sin().numpy()
    data = pandas.DataFrame({"unique_id": "a", "ds": pandas.date_range("2020-01-01", periods=120), "y": y})

    def forecast() -> Tensor:
        trained = core.NeuralForecast(models=[neural("mLSTM", steps=5)], freq="D")
        trained.fit(data)
        return torch.from_numpy(trained.predict()["xLSTM"].to_numpy(copy=True))

    wanted = forecast()
    with patch("xlstm"):
        torch.testing.assert_close(forecast(), wanted, rtol=1e-3, atol=1e-4)
