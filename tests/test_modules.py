"""Laws of the module of nn.LSTM's shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

from tests.oracle import assert_close
from torch_xlstm_ops import MLSTMState, SLSTMState
from torch_xlstm_ops.modules import xLSTM

H, NH, KINDS = 48, 3, ["mlstm", "slstm"]  # heads as in oracle.Sizes, whose kernels are there
pytestmark = pytest.mark.usefixtures("small_chunks")


def build(kind: str, input_size: int = H, **options: Any) -> xLSTM:
    """Return a module in float64 without zero weights."""
    torch.manual_seed(0)
    heads = NH if kind == "mlstm" else 6
    module = xLSTM(input_size, H, kind=kind, num_heads=heads, qk_dim=H // 2, **options).double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return module


def drawn(*size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size)), dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_equal_the_whole(kind: str) -> None:
    module, x = build(kind, 10, num_layers=2), drawn(9, 2, 10)
    whole, final = module(x)
    assert whole.shape == (9, 2, H)
    assert isinstance(final, MLSTMState if kind == "mlstm" else SLSTMState)
    assert all(part.shape[:2] == (2, 2) for part in final)
    parts, state = [], None
    for part in x.split([4, 1, 1, 3]):
        y, state = module(part, state)
        parts.append(y)
    assert_close([torch.cat(parts), *state], [whole, *final], 1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_layouts_agree(kind: str) -> None:
    module, x = build(kind), drawn(5, 2, H)
    whole, final = module(x)
    first = build(kind, batch_first=True)
    assert_close([first(x.transpose(0, 1))[0]], [whole.transpose(0, 1)], 1e-12)
    y, state = module(x[:, 1])
    assert_close([y, *state], [whole[:, 1], *(part[:, 1] for part in final)], 1e-9)
    y, state = module(x[:, 1], state)
    assert y.shape == (5, H)
    assert all(a.shape == b[:, 1].shape for a, b in zip(state, final, strict=True))


@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences_equal_each_alone(kind: str, sort: bool) -> None:
    module = build(kind, num_layers=2, bidirectional=True)
    sequences = [drawn(S, H) for S in ((9, 6, 6, 1) if sort else (6, 9, 1, 6))]
    before = [drawn(*part.shape[:1], 4, *part.shape[1:]).abs() for part in module(sequences[0])[1]]
    for given in (None, before):
        packed, state = module(pack_sequence(sequences, enforce_sorted=sort), given)
        assert isinstance(packed, PackedSequence)
        found, lengths = pad_packed_sequence(packed, batch_first=True)
        for row, (x, S) in enumerate(zip(sequences, lengths, strict=True)):
            y, after = module(x, None if given is None else [part[:, row] for part in given])
            assert_close([found[row, :S], *(part[:, row] for part in state)], [y, *after], 1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_directions_are_those_of_the_reversed_input(kind: str) -> None:
    module, one, x = build(kind, bidirectional=True), build(kind), drawn(9, 2, H)
    y, state = module(x)
    for direction, read in enumerate((x, x.flip(0))):
        one.blocks[0].load_state_dict(module.blocks[direction].state_dict())
        wanted, after = one(read)
        half = y[..., direction * H : (direction + 1) * H]
        assert_close([half.flip(0) if direction else half, *(part[direction] for part in state)],
                     [wanted, *(part[0] for part in after)], 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_packed_sequences_equal_those_of_each_alone(kind: str) -> None:
    module, sequences = build(kind), [drawn(S, H) for S in (6, 9)]
    found = []
    for packed in (True, False):
        module.zero_grad()
        if packed:
            y: Any = module(pack_sequence(sequences, enforce_sorted=False))[0].data
            y.square().sum().backward()
        else:
            for x in sequences:
                module(x)[0].square().sum().backward()
        found.append([parameter.grad.clone() for parameter in module.parameters() if parameter.requires_grad])
    assert_close(found[0], found[1], 1e-8)


@pytest.mark.parametrize("weight_mode", ["single", "fused"])
def test_weights_of_a_whole_model_give_its_hidden_states(weight_mode: str) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the package transformers")
    torch.manual_seed(0)
    model = transformers.xLSTMModel(transformers.xLSTMConfig(
        vocab_size=61, hidden_size=64, num_hidden_layers=2, num_heads=2, qk_dim_factor=1.0, norm_eps=1e-4,
        norm_reduction_force_float32=False, use_bias=True,
    )).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    ids = torch.arange(18).view(2, 9)
    with torch.no_grad():
        out = model(ids, use_cache=True)
    cache = out.cache if hasattr(out, "cache") else out.cache_params
    if weight_mode == "fused":
        fuse(model)
    module = xLSTM.from_model(model)
    y, state = module(model.embeddings(ids))
    assert_close([y], [out.last_hidden_state], 1e-5)  # the model's own norm at the end has float32
    assert_close([part[1] for part in state], list(cache.rnn_state[1]), 1e-5)


def fuse(model: Any) -> None:
    """Give each block its weights as transformers' weight_mode fused has them."""
    def joined(*layers: Any) -> torch.nn.Linear:
        layer = torch.nn.Linear(1, 1)
        layer.weight = torch.nn.Parameter(torch.cat([one.weight for one in layers]))
        layer.bias = torch.nn.Parameter(torch.cat([one.bias for one in layers]))
        return layer

    for block in model.blocks:
        m, f = block.mlstm_layer, block.ffn
        m.qkv_opreact, m.ifgate_preact = joined(m.q, m.k, m.v, m.ogate_preact), joined(m.igate_preact, m.fgate_preact)
        f.proj_up_gate_z = joined(f.proj_up_gate, f.proj_up)
        for owner, names in ((m, ("q", "k", "v", "ogate_preact", "igate_preact", "fgate_preact")),
                             (f, ("proj_up_gate", "proj_up"))):
            for name in names:
                delattr(owner, name)


def test_weights_of_xlstm_large_give_its_hidden_states() -> None:
    pytest.importorskip("xlstm", reason="needs the package xlstm")
    from xlstm.xlstm_large.model import xLSTMLarge, xLSTMLargeConfig

    torch.manual_seed(0)
    model = xLSTMLarge(xLSTMLargeConfig(
        embedding_dim=H, num_heads=NH, num_blocks=1, vocab_size=61, qk_dim_factor=0.5, mode="inference",
        chunkwise_kernel="chunkwise--native_autograd", sequence_kernel="native_sequence__native", step_kernel="native",
        norm_reduction_force_float32=False, autocast_kernel_dtype="float32", return_last_states=True,
    )).double().eval()
    x = drawn(2, 9, H)
    with torch.no_grad():
        wanted, _ = model.backbone(x, None)
        assert_close([xLSTM.from_model(model)(x)[0]], [wanted], 1e-5)


def test_errors_say_what_to_do() -> None:
    module = build("mlstm")
    with pytest.raises(ValueError, match=r"input must be \(S, B, 48\), \(S, 48\) or packed, got \(2, 9, 3\)"):
        module(drawn(2, 9, 3))
    with pytest.raises(ValueError, match=r"state must be c, n, m, each \(1, 2, ...\), got \(1, 3, 5\)"):
        module(drawn(9, 2, H), [drawn(1, 3, 5)])
    with pytest.raises(ValueError, match="hidden_size must be a multiple of num_heads = 5, got 48"):
        xLSTM(H, H, num_heads=5)
    with pytest.raises(ValueError, match="kind must be one of mlstm, slstm, got 'lstm'"):
        xLSTM(H, H, kind="lstm")
    with pytest.raises(ValueError, match=r"model must be an xLSTM of transformers or of xlstm.xlstm_large, got Linear"):
        xLSTM.from_model(torch.nn.Linear(2, 2))
