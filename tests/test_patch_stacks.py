"""Laws of xlstm's stacks while patched: a state in and out, for any number of tokens at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.oracle import assert_close
from torch_xlstm_ops.patch import patch

pytest.importorskip("xlstm", reason="needs the package xlstm")

import xlstm
from xlstm.components.conv import CausalConv1d

D = 32


def stack(**options: Any) -> Any:
    torch.manual_seed(0)
    return xlstm.xLSTMBlockStack(xlstm.xLSTMBlockStackConfig(
        mlstm_block=xlstm.mLSTMBlockConfig(mlstm=xlstm.mLSTMLayerConfig(num_heads=4)),
        slstm_block=xlstm.sLSTMBlockConfig(
            slstm=xlstm.sLSTMLayerConfig(backend="vanilla", num_heads=4, dropout=0.0),
            feedforward=xlstm.FeedForwardConfig(proj_factor=1.3, act_fn="gelu"),
        ),
        context_length=64, num_blocks=2, embedding_dim=D, slstm_at=[1], **options,
    )).double()


def drawn(S: int) -> Tensor:
    return torch.randn(2, S, D, generator=torch.Generator().manual_seed(S), dtype=torch.float64)


@pytest.mark.parametrize("cuts", [[9], [5, 4], [1] * 9, [3, 1, 2, 1, 2]])
@pytest.mark.parametrize("how", ["step", "forward"])
def test_steps_of_any_number_of_tokens_equal_the_whole(how: str, cuts: list[int]) -> None:
    model, x = stack(), drawn(9)
    with torch.no_grad():
        unpatched = model(x)
    with patch("xlstm"), torch.no_grad():
        parts, state = [], None
        for part in x.split(cuts, 1):
            if how == "step":
                y, state = model.step(part, state)
            else:
                y, state = model(part, state=state, return_last_state=True)
            parts.append(y)
        assert_close([torch.cat(parts, 1), model(x)], [unpatched] * 2, 1e-6)  # theirs has float32 in its cells
        assert_close([torch.cat(parts, 1)], [model(x)], 1e-9)


@pytest.mark.slow
def test_gradients_through_states_equal_those_of_the_whole() -> None:
    model, x = stack(), drawn(9)
    weights = drawn(9)
    with patch("xlstm"):
        found = []
        for cuts in ([9], [4, 1, 4]):
            model.zero_grad()
            parts, state = [], None
            for part in x.split(cuts, 1):
                y, state = model(part, state=state, return_last_state=True)
                parts.append(y)
            (torch.cat(parts, 1) * weights).sum().backward()
            found.append([parameter.grad for parameter in model.parameters()])
    assert_close(found[1], found[0], 1e-8)


def test_a_state_that_was_given_is_left_as_it_is() -> None:
    model, x = stack(), drawn(6)
    with patch("xlstm"), torch.no_grad():
        _, state = model(x, return_last_state=True)
        first = model(x[:, :1], state=state)
        assert_close(model(x[:, :1], state=state)[0], first[0], 0)


def test_a_language_model_steps_over_several_tokens() -> None:
    torch.manual_seed(0)
    config = xlstm.xLSTMLMModelConfig(
        vocab_size=17, mlstm_block=xlstm.mLSTMBlockConfig(mlstm=xlstm.mLSTMLayerConfig(num_heads=4)),
        context_length=64, num_blocks=1, embedding_dim=D,
    )
    model, ids = xlstm.xLSTMLMModel(config).double(), torch.arange(9)[None] % 17
    with patch("xlstm"), torch.no_grad():
        first, state = model.step(ids[:, :5])
        second, _ = model.step(ids[:, 5:], state)
        assert_close([torch.cat([first, second], 1)], [model(ids)], 1e-9)


def test_removal_restores_the_stack() -> None:
    before = vars(xlstm.xLSTMBlockStack)["forward"], vars(CausalConv1d)["step"]
    with patch("xlstm"):
        assert vars(CausalConv1d)["step"] is not before[1]
    assert (vars(xlstm.xLSTMBlockStack)["forward"], vars(CausalConv1d)["step"]) == before
