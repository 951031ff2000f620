"""Laws of the mLSTM with a sigmoid input gate, against its recurrence token by token."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.oracle import GRADIENT_TOLERANCE, TOLERANCE, Sizes, assert_close, draw
from tests.parameters import tail
from torch_xlstm_ops import mlstm_sigmoid_chunkwise, mlstm_sigmoid_step

L, EPS = 16, 1e-6


def exact(args: Sequence[Tensor], normalize: bool, reset: Tensor | None = None) -> list[Tensor]:
    """Return h, c, n in float64."""
    q, k, v, igate, fgate, c, n = (t.double() for t in args)
    hs = []
    for t in range(q.shape[2]):
        if reset is not None:
            c, n = c * ~reset[:, t, None, None, None], n * ~reset[:, t, None, None]
        forget, take = torch.sigmoid(fgate[:, :, t, None]), torch.sigmoid(igate[:, :, t, None])
        c = forget[..., None] * c + take[..., None] * k[:, :, t, :, None] * v[:, :, t, None]
        n = forget * n + take * k[:, :, t]
        scaled = q[:, :, t] * q.shape[-1] ** -0.5
        h = (scaled[..., None, :] @ c).squeeze(-2)
        if normalize:
            h = h / ((scaled * n).sum(-1, keepdim=True).abs().clamp(min=1.0) + EPS)
        hs.append(h)
    return [torch.stack(hs, 2), c, n]


def drawn(sizes: Sizes, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    return draw(sizes, dtype, seed=seed)[:7]


def flat(result: tuple[Tensor, Sequence[Tensor]]) -> list[Tensor]:
    return [result[0], *result[1]]


@pytest.mark.slow
@given(S=st.integers(1, 80), normalize=st.booleans(), seed=st.integers(0, 2**16), with_reset=st.booleans())
def test_a_sequence_and_its_gradients_equal_the_recurrence(S, normalize, seed, with_reset):
    args = [t.requires_grad_() for t in drawn(Sizes(S=S), seed=seed)]
    B = args[0].shape[0]
    reset = torch.rand(B, S, generator=torch.Generator().manual_seed(seed)) < 0.2 if with_reset else None
    found = flat(mlstm_sigmoid_chunkwise(*args, normalize=normalize, reset=reset, chunk_size=L))
    wanted = exact(args, normalize, reset)
    assert_close(found, wanted, TOLERANCE[torch.float64])
    weights = [torch.randn(t.shape, dtype=t.dtype, generator=torch.Generator().manual_seed(1)) for t in wanted]
    gradients = [torch.autograd.grad(sum((t * w).sum() for t, w in zip(ts, weights, strict=True)), args)
                 for ts in (found, wanted)]
    assert_close(*gradients, GRADIENT_TOLERANCE[torch.float64])


@pytest.mark.parametrize("normalize", tail([True, False]))
@pytest.mark.parametrize("dtype", tail([torch.float32, torch.bfloat16, torch.float16]))
def test_every_dtype_is_near_float64(dtype, normalize):
    args = drawn(Sizes(S=40), dtype)
    found, wanted = flat(mlstm_sigmoid_chunkwise(*args, normalize=normalize, chunk_size=L)), exact(args, normalize)
    assert found[0].dtype == dtype
    assert_close(found, wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("normalize", tail([True, False]))
def test_steps_equal_the_sequence(normalize):
    args = drawn(Sizes(S=7))
    wanted = flat(mlstm_sigmoid_chunkwise(*args, normalize=normalize, chunk_size=L))
    *streams, c, n = args
    hs, state = [], (c, n)
    for t in range(7):
        q, k, v = (s[:, :, t] for s in streams[:3])
        h, state = mlstm_sigmoid_step(q, k, v, *(s[:, :, t : t + 1] for s in streams[3:]), *state, normalize=normalize)
        hs.append(h)
    assert_close([torch.stack(hs, 2), *state], wanted, TOLERANCE[torch.float64])


@pytest.mark.parametrize("normalize", tail([True, False]))
def test_closed_and_open_gates(normalize):
    args = drawn(Sizes(S=40))
    args[3][:, :, 5:9], args[4][:, :, 5:9] = -torch.inf, torch.inf  # change nothing
    args[3][:, :, 20:30] = -100.0
    args[4][:, :, 33] = -torch.inf
    found = flat(mlstm_sigmoid_chunkwise(*args, normalize=normalize, chunk_size=L))
    assert_close(found, exact(args, normalize), TOLERANCE[torch.float64])


@pytest.mark.slow
def test_documents_have_a_state_each():
    args = drawn(Sizes(B=1, S=9))
    state = [torch.cat([t, 2 * t]) for t in args[5:]]
    ends = torch.tensor([0, 4, 9])
    h, after = mlstm_sigmoid_chunkwise(*args[:5], *state, cu_seqlens=ends)
    for document, (a, b) in enumerate([(0, 4), (4, 9)]):
        alone = mlstm_sigmoid_chunkwise(*(t[:, :, a:b] for t in args[:5]),
                                        *(t[document : document + 1] for t in state))
        assert_close([h[:, :, a:b], *(t[document : document + 1] for t in after)], flat(alone), 1e-9)


def test_half_a_state_is_refused():
    *streams, c, _ = drawn(Sizes(S=3))
    with pytest.raises(ValueError, match="c and n must be given together"):
        mlstm_sigmoid_chunkwise(*streams, c)
