"""Laws of xlstm's block stack as a module of nn.LSTM's shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

from tests.oracle import assert_close
from torch_xlstm_ops.modules import xLSTM, xLSTMStack
from torch_xlstm_ops.patch import patch

xlstm = pytest.importorskip("xlstm", reason="needs the package xlstm")

D = 32


def stack(backend: str = "vanilla", **options: Any) -> Any:
    """Return xlstm's stack of an mLSTM, an sLSTM and a feed-forward in float64, without zero weights."""
    torch.manual_seed(0)
    config = xlstm.xLSTMBlockStackConfig(
        mlstm_block=xlstm.mLSTMBlockConfig(mlstm=xlstm.mLSTMLayerConfig(num_heads=4)),
        slstm_block=xlstm.sLSTMBlockConfig(
            slstm=xlstm.sLSTMLayerConfig(backend=backend, num_heads=4, dropout=0.0),
            feedforward=xlstm.FeedForwardConfig(proj_factor=1.3, act_fn="gelu"),
        ),
        context_length=64, num_blocks=2, embedding_dim=D, slstm_at=[1], **options,
    )
    with patch("xlstm"):  # the cuda backend needs CUDA without
        model = xlstm.xLSTMBlockStack(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def built(**options: Any) -> xLSTMStack:
    module = xLSTM.from_model(stack(), **options)
    assert isinstance(module, xLSTMStack)
    return module


def drawn(*size: int) -> Tensor:
    return torch.randn(*size, D, generator=torch.Generator().manual_seed(sum(size)), dtype=torch.float64)


@pytest.mark.parametrize("options", [
    {}, {"backend": "cuda"}, {"bias": True}, {"add_post_blocks_norm": False},
], ids=["vanilla", "cuda", "bias", "no norm"])
def test_a_module_from_a_stack_equals_the_stack(options: dict[str, Any]) -> None:
    model, x = stack(**options), drawn(2, 9)
    with torch.no_grad(), patch("xlstm"):
        assert_close([xLSTM.from_model(model)(x)[0]], [model(x)], 1e-9)


def test_a_module_from_a_language_model_has_its_stack() -> None:
    model = torch.nn.Module()
    model.xlstm_block_stack = stack()
    assert_close([xLSTM.from_model(model)(drawn(2, 9))[0]], [built()(drawn(2, 9))[0]], 0)


def test_a_stack_in_pieces_equals_the_whole() -> None:
    module, x = built(), drawn(2, 9)
    whole, final = module(x)
    parts, state = [], None
    for part in x.split([4, 1, 1, 3], 1):
        y, state = module(part, state)
        parts.append(y)
    assert_close([torch.cat(parts, 1), *state[0], *state[1]], [whole, *final[0], *final[1]], 1e-9)


@pytest.mark.slow
def test_layouts_of_a_stack_agree() -> None:
    module, x = built(), drawn(2, 9)
    whole, final = module(x)
    y, state = module(x[1], module(x[1])[1])
    again = module(x[1:], [[part[1:] for part in one] for one in final])
    assert_close([y, *state[0]], [again[0][0], *(part[0] for part in again[1][0])], 1e-9)
    assert_close([built(batch_first=False)(x.transpose(0, 1))[0]], [whole.transpose(0, 1)], 1e-12)


def test_packed_sequences_through_a_stack_equal_each_alone() -> None:
    module, rows = built(), [drawn(S) for S in (6, 9, 1, 6)]
    before = [[torch.stack([part] * 4) for part in one] for one in module(drawn(5))[1]]
    for given in (None, before):
        packed, state = module(pack_sequence(rows, enforce_sorted=False), given)
        found, lengths = pad_packed_sequence(packed, batch_first=True)
        for row, (x, S) in enumerate(zip(rows, lengths, strict=True)):
            y, after = module(x, None if given is None else [[part[row] for part in one] for one in given])
            kept = [part[row] for one in state for part in one]
            assert_close([found[row, :S], *kept], [y, *after[0], *after[1]], 1e-9)


def test_a_stacks_state_of_another_size_is_refused() -> None:
    module, x = built(), drawn(2, 9)
    with pytest.raises(ValueError, match="state must hold a state of 2 rows for each of 2 blocks"):
        module(x, module(x[:1])[1])
