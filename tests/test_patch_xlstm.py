"""Laws of the xlstm drop-in, compared with the package's vanilla code."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.oracle import assert_close, error
from torch_xlstm_ops.maths import slstm
from torch_xlstm_ops.patch import convert_slstm_state_dict, patch

pytest.importorskip("xlstm", reason="needs the package xlstm")

import xlstm
from xlstm.blocks.mlstm.cell import mLSTMCell, mLSTMCellConfig
from xlstm.blocks.slstm.cell import sLSTMCell, sLSTMCellConfig

B, NH, DH, H = 2, 4, 8, 32
WITHOUT_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA the unpatched backend builds too")


def slstm_cell(backend: str, **options: Any) -> Any:
    """Return a cell whose weights are the same for either backend, each in its own layout."""
    cell = sLSTMCell(sLSTMCellConfig(hidden_size=H, num_heads=NH, backend=backend, dtype="float32", **options))
    g = torch.Generator().manual_seed(0)
    r, b = torch.randn(NH, DH, 4, DH, generator=g) / 4, torch.randn(NH, 4, DH, generator=g)
    cell._recurrent_kernel_.data = cell._recurrent_kernel_ext2int(r).contiguous()
    cell._bias_.data = cell._bias_ext2int(b).contiguous()
    return cell


def drawn(*size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size)))


@pytest.mark.parametrize("output_shape", ["BNSH", "SBH", "BSH", "SBNH"])
@pytest.mark.parametrize("input_shape", ["BSGNH", "SBGNH"])
@pytest.mark.parametrize("backend", ["vanilla", "cuda"])
def test_slstm_cells_equal_vanilla(backend: str, input_shape: str, output_shape: str) -> None:
    shapes = {"input_shape": input_shape, "output_shape": output_shape}
    x = drawn(B, 7, 4 * H) if input_shape == "BSGNH" else drawn(7, B, 4 * H)
    state = drawn(4, B, H).abs()
    theirs = [slstm_cell("vanilla", **shapes)(x, s) for s in (None, state)]
    with patch("xlstm"):
        cell = slstm_cell(backend, **shapes)
        for (h, after), s in zip(theirs, (None, state), strict=True):
            found, found_after = cell(x, s)
            assert found.shape == h.shape
            assert_close([found, found_after], [h, after], 1e-5)


@pytest.mark.smoke
@pytest.mark.parametrize("backend", ["vanilla", "cuda"])
def test_slstm_steps_return_the_state_after_the_token_unless_compat(backend: str) -> None:
    x = drawn(B, 9, 4 * H)
    whole, after = slstm_cell("vanilla")(x)
    state: Tensor
    with patch("xlstm"):
        cell = slstm_cell(backend)
        h, state = cell(x[:, :5])
        for t in range(5, 9):
            h, state = cell.step(x[:, t:t + 1], state)
            assert_close([h], [whole[:, :, t:t + 1]], 1e-5)
    assert_close([state], [after], 1e-5)
    vanilla, old = slstm_cell("vanilla"), drawn(4, B, H).abs()
    assert vanilla.step(x[:, :1], old)[1] is old
    with patch("xlstm", compat=True):
        assert vanilla.step(x[:, :1], old)[1] is old


@WITHOUT_CUDA
def test_cells_of_the_default_backend_work_after_removal() -> None:
    x, (h, after) = drawn(B, 7, 4 * H), slstm_cell("vanilla")(drawn(B, 7, 4 * H))
    with pytest.raises(KeyError, match="CUDA_LIB"):
        slstm_cell("cuda")
    with patch("xlstm"):
        cell = slstm_cell("cuda")
    for one in (cell, copy.deepcopy(cell)):
        found, found_after = one(x)
        assert_close([found, found_after], [h, after], 1e-5)


def exact_slstm(x: Tensor, r: Tensor, b: Tensor) -> Tensor:
    """Return h (B, S, H) of x (B, S, 4 H) by r (NH, DH_in, 4, DH_out) and b (NH, 4, DH), in float64, token by token."""
    S = x.shape[1]
    streams = x.double().view(B, S, 4, NH, DH)
    weights, bias = r.double().permute(2, 0, 3, 1), b.double().transpose(0, 1)
    return slstm.recurrent(streams, weights, bias, *torch.zeros(4, B, NH, DH, dtype=torch.float64),
                           floor=0.0)[0].reshape(B, S, H)


@pytest.mark.parametrize("source", ["vanilla", "cuda"])
@pytest.mark.parametrize("by", ["loading", "converting"])
def test_a_cell_runs_on_the_weights_of_the_other_backend(source: str, by: str) -> None:
    target = {"vanilla": "cuda", "cuda": "vanilla"}[source]
    x = drawn(B, 7, 4 * H).double()
    with patch("xlstm"):
        cell, other = (slstm_cell(backend, output_shape="BSH").double() for backend in (source, target))
        torch.nn.init.normal_(other._recurrent_kernel_)
        torch.nn.init.normal_(other._bias_)
        saved = cell.state_dict()
        before = {name: tensor.clone() for name, tensor in saved.items()}
        if by == "loading":
            other.load_state_dict(saved)
        with_converted = convert_slstm_state_dict(saved, to=target)
        if by == "converting":
            other.load_state_dict(with_converted)
        wanted = exact_slstm(x, cell._recurrent_kernel_int2ext(cell._recurrent_kernel_.detach()),
                             cell._bias_int2ext(cell._bias_.detach()))
        assert_close([cell(x)[0], other(x)[0]], [wanted, wanted], 1e-10)
    assert all(torch.equal(saved[name], before[name]) for name in before)
    again = convert_slstm_state_dict(with_converted, to=source)
    assert all(torch.equal(again[name], before[name]) for name in before)
    assert convert_slstm_state_dict(saved, to=source).keys() == saved.keys()


@pytest.mark.smoke
def test_a_stack_loads_what_the_other_backend_saved() -> None:
    x = drawn(B, 6, H)
    theirs = stack("vanilla")
    for name, weight in theirs.named_parameters():
        if "slstm_cell" in name:
            torch.nn.init.normal_(weight, std=0.2)
    wanted = theirs(x)
    with patch("xlstm"):
        model = stack("cuda", dtype="float32")
        model.load_state_dict(theirs.state_dict())
        assert_close([model(x)], [wanted], 1e-4)
        back = stack("vanilla")
        back.load_state_dict(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), theirs.parameters(), strict=True))
    kept = convert_slstm_state_dict(theirs.state_dict(), to="cuda", prefix="blocks.0.")
    assert all(kept[name] is tensor or torch.equal(kept[name], tensor) for name, tensor in theirs.state_dict().items())


def test_weights_that_fit_no_backend_are_refused() -> None:
    saved = slstm_cell("vanilla").state_dict()
    with pytest.raises(ValueError, match="to must be one of vanilla, cuda, got 'triton'"):
        convert_slstm_state_dict(saved, to="triton")
    with pytest.raises(ValueError, match=r"must hold a\._bias_ beside a\._recurrent_kernel_, got none"):
        convert_slstm_state_dict({"a._recurrent_kernel_": saved["_recurrent_kernel_"]}, to="cuda")
    with pytest.raises(ValueError, match=r"must be \(NH, 4 DH, DH\) or \(NH, DH, 4 DH\) .*got \(4, 32, 7\) and"):
        convert_slstm_state_dict({**saved, "_recurrent_kernel_": saved["_recurrent_kernel_"][..., 1:]}, to="cuda")
    with patch("xlstm"), pytest.raises(RuntimeError, match="size mismatch for _recurrent_kernel_"):
        slstm_cell("cuda").load_state_dict({**saved, "_recurrent_kernel_": torch.zeros(1, 2, 3)})


@pytest.mark.parametrize("options", [{"gradient_recurrent_cut": True}, {"gradient_recurrent_clipval": 1.0}])
@WITHOUT_CUDA
def test_options_that_alter_gradients_run_the_cuda_backend(options: dict[str, Any]) -> None:
    with patch("xlstm"), pytest.raises(KeyError, match="CUDA_LIB"):
        slstm_cell("cuda", **options)


def test_other_functions_are_not_replaced() -> None:
    cell = sLSTMCell(sLSTMCellConfig(hidden_size=H, num_heads=NH, backend="vanilla", function="lstm"))
    theirs = cell(drawn(B, 3, 4 * H))
    with patch("xlstm"):
        assert all(torch.equal(a, b) for a, b in zip(cell(drawn(B, 3, 4 * H)), theirs, strict=True))


def mlstm_cell(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    cell = mLSTMCell(mLSTMCellConfig(context_length=16, embedding_dim=H, num_heads=NH))
    for gate in (cell.igate, cell.fgate):
        torch.nn.init.normal_(gate.weight, std=0.3)
    return cell.to(dtype).eval()


def steps(cell: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Any]:
    found, state = [], None
    for t in range(q.shape[1]):
        at = slice(t, t + 1)
        h, state = cell.step(q[:, at].clone(), k[:, at].clone(), v[:, at].clone(), mlstm_state=state)
        found.append(h)
    return torch.cat(found, 1), state


@pytest.mark.smoke
def test_mlstm_cells_equal_their_unpatched_selves() -> None:
    """The norm after the cell divides by small deviations, hence the tolerance."""
    cell, inputs = mlstm_cell(), drawn(3, B, 12, H)
    h, (stepped, state) = cell(*inputs), steps(cell, *inputs)
    with patch("xlstm"):
        found, (found_stepped, found_state) = cell(*inputs), steps(cell, *inputs)
        longer = cell(*drawn(3, B, 40, H))  # beyond the mask, which ours has no need of
    assert_close([found, found_stepped], [h, stepped], 1e-4)
    assert [t.shape for t in found_state] == [t.shape for t in state]
    assert_close(found_state, state, 1e-5)
    assert longer.shape == (B, 40, H)


def test_mlstm_steps_do_not_change_their_inputs() -> None:
    q, k, v = (t.clone() for t in drawn(3, B, 1, H))
    with patch("xlstm"):
        mlstm_cell().step(q, k, v)
    assert q.shape == k.shape == v.shape == (B, 1, H)


def test_mlstm_states_stay_float32_unless_compat() -> None:
    cell, inputs = mlstm_cell(torch.bfloat16), drawn(3, B, 12, H).bfloat16()
    exact = steps(mlstm_cell(torch.float64), *inputs.double())[1]
    theirs = steps(cell, *inputs)[1]
    with patch("xlstm"):
        ours = steps(cell, *inputs)[1]
    with patch("xlstm", compat=True):
        compat = steps(cell, *inputs)[1]
    assert {t.dtype for t in ours} == {torch.float32}
    assert {t.dtype for t in compat} == {t.dtype for t in theirs} == {torch.bfloat16}
    worst = [max(error(a, b) for a, b in zip(found, exact, strict=True)) for found in (ours, theirs)]
    assert worst[0] <= worst[1]


def test_a_cell_with_another_backend_is_not_replaced() -> None:
    cell, inputs = mlstm_cell(), drawn(3, B, 12, H)
    cell.backend_fn = lambda **given: given["values"] * 2
    theirs = cell(*inputs)
    with patch("xlstm"):
        assert torch.equal(cell(*inputs), theirs)


def stack(backend: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return xlstm.xLSTMBlockStack(xlstm.xLSTMBlockStackConfig(
        mlstm_block=xlstm.mLSTMBlockConfig(mlstm=xlstm.mLSTMLayerConfig()),
        slstm_block=xlstm.sLSTMBlockConfig(slstm=xlstm.sLSTMLayerConfig(backend=backend, **options)),
        context_length=16, num_blocks=2, embedding_dim=H, slstm_at=[1],
    ))


def parity_losses(model: Any, count: int) -> list[float]:
    """Train on the parity of bits."""
    torch.manual_seed(1)
    embed, head = torch.nn.Embedding(2, H), torch.nn.Linear(H, 2)
    optimizer = torch.optim.AdamW([*model.parameters(), *embed.parameters(), *head.parameters()], lr=3e-3)
    losses = []
    for _ in range(count):
        bits = torch.randint(2, (32, 8))
        loss = torch.nn.functional.cross_entropy(head(model(embed(bits))).flatten(0, 1), bits.cumsum(1).flatten() % 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
def test_the_default_stack_trains_as_the_vanilla_one() -> None:
    theirs = parity_losses(stack("vanilla"), 20)
    with patch("xlstm"):
        same = parity_losses(stack("cuda", dtype="float32"), 20)
        default = parity_losses(stack("cuda"), 20)
    torch.testing.assert_close(torch.tensor(same), torch.tensor(theirs), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(torch.tensor(default), torch.tensor(theirs), rtol=2e-2, atol=2e-2)  # in bfloat16
    assert theirs[-1] < theirs[0]
    assert default[-1] < default[0]


def test_a_stack_steps_as_it_runs() -> None:
    x = drawn(B, 6, H)
    with patch("xlstm"):
        model, state, found = stack("cuda", dtype="float32").eval(), {}, []
        whole = model(x)
        for t in range(6):
            h, state = model.step(x[:, t:t + 1], state)
            found.append(h)
    assert_close([torch.cat(found, 1)], [whole], 1e-3)


@pytest.mark.smoke
@WITHOUT_CUDA
def test_the_default_xlstm_large_loads_and_generates_anywhere() -> None:
    from xlstm.xlstm_large import xLSTMLarge, xLSTMLargeConfig

    def build(**options: Any) -> Any:
        torch.manual_seed(0)
        return xLSTMLarge(xLSTMLargeConfig(embedding_dim=64, num_heads=2, num_blocks=2, vocab_size=61,
                                           mode="inference", return_last_states=True, **options)).eval()

    native = build(chunkwise_kernel="chunkwise--native_autograd", sequence_kernel="native_sequence__native",
                   step_kernel="native")
    ids = torch.arange(20)[None] % 61
    theirs, _ = native.generate(ids, max_length=12)
    with patch("xlstm"):
        model = build()
        model.load_state_dict(native.state_dict())
        assert torch.equal(model.generate(ids, max_length=12)[0], theirs)
