"""Laws of the Dynamo backend on the functions of mlstm_kernels, xlstm and flashrnn, not patched."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import torch_xlstm_ops
from tests.oracle import TOLERANCE, Sizes, assert_close, draw, exact
from tests.parameters import tail
from torch_xlstm_ops import mlstm_sigmoid_chunkwise

# What the peers' own float32 rounding allows.
PEER_TOLERANCE = 10 * TOLERANCE[torch.float32]


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def function(module: str, name: str) -> Callable[..., Any]:
    pytest.importorskip(module.split(".")[0])
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


def compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(within(fn), backend="xlstm", fullgraph=True)


def within(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function, before torch 2.13 as another one that calls it: Dynamo replaces only these there."""
    if torch.__version__ >= (2, 13):
        return fn
    return lambda *args, **kwargs: fn(*args, **kwargs)


def flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for part in result for t in flat(part)]


def taken(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Return the explanation of a call, which must have been taken whole."""
    text = torch_xlstm_ops.explain(within(fn), *args, **kwargs)
    assert "0 graph breaks" in text
    assert "is not replaced" not in text
    assert "-> torch.ops.xlstm" in text
    return text


# --- mlstm_kernels ---

NAMES = ("q", "k", "v", "i", "f", "c_initial", "n_initial", "m_initial")
SEQUENCES = [
    ("mlstm_kernels.torch.chunkwise.native.fwbw", "mlstm_chunkwise__native_autograd"),
    ("mlstm_kernels.torch.chunkwise.native.fwbw", "mlstm_chunkwise__native_custbw"),
    ("mlstm_kernels.torch.recurrent.native_sequence", "mlstm_recurrent_sequence__native_fw"),
]


@pytest.mark.smoke
@pytest.mark.parametrize(("module", "name"), tail(SEQUENCES), ids=lambda text: text.split(".")[-1])
def test_sequences_of_mlstm_kernels_become_operators(module: str, name: str):
    fn, args = function(module, name), draw(Sizes(S=64))
    given = {**dict(zip(NAMES, args, strict=True)), "return_last_states": True}
    assert_close(flat(compiled(fn)(**given)), exact(args), TOLERANCE[torch.float32])
    assert_close(flat(fn(**given)), exact(args), PEER_TOLERANCE)
    assert name in taken(fn, **given)
    alone = compiled(fn)(*args[:5])  # by position, no states asked for
    assert_close([alone], exact(args[:5])[:1], TOLERANCE[torch.float32])


@pytest.mark.smoke
def test_a_step_of_mlstm_kernels_becomes_an_operator():
    fn = function("mlstm_kernels.torch.recurrent.native_step", "mlstm_recurrent_step__native")
    q, k, v, igate, fgate, *state = draw(Sizes(S=1))
    args = (q[:, :, 0], k[:, :, 0], v[:, :, 0], igate, fgate, *state)
    assert_close(flat(compiled(fn)(*args)), flat(fn(*args)), PEER_TOLERANCE)
    taken(fn, *args)


def backend(**options: Any) -> Any:
    module = "mlstm_kernels.torch.backend_module"
    settings = {"chunkwise_kernel": "chunkwise--native_autograd", "sequence_kernel": "native_sequence__native",
                "step_kernel": "native", "mode": "inference"}
    return function(module, "mLSTMBackend")(function(module, "mLSTMBackendConfig")(**settings | options))


@pytest.mark.slow
@pytest.mark.parametrize("S", [1, 2, 70])
def test_the_backend_module_is_one_operator_for_any_length(S: int):
    layer, args = backend(), draw(Sizes(S=S))
    given = dict(zip(NAMES, args, strict=True))
    assert_close(flat(compiled(layer)(**given)), exact(args), TOLERANCE[torch.float32])
    assert taken(layer, **given).count("-> torch.ops.xlstm") == 1


@pytest.mark.slow
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("name", ["native_autograd", "native_custbw"])
def test_a_sequence_with_a_sigmoid_input_gate_is_replaced(name: str, normalize: bool):
    kernel = function("mlstm_kernels.torch.parallel.native_siging.fwbw", f"mlstm_siging_parallel__{name}")
    args = draw(Sizes(S=33), state=False)

    def call(*args: Tensor) -> Any:
        return kernel(*args, normalize=normalize)

    assert_close([compiled(call)(*args)], [call(*args)], TOLERANCE[torch.float32])
    assert taken(call, *args).count("-> torch.ops.xlstm") == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", tail(["wrap_chunkwise__arbitrary_sequence_length_with_padding",
                                       "wrap_chunkwise__arbitrary_sequence_length"]))
@pytest.mark.parametrize("normalize", tail([None, False]))
@pytest.mark.parametrize("S", tail([33, 1]))
def test_a_wrapped_sigmoid_input_gate_is_replaced(name: str, normalize: bool | None, S: int):
    wrap = function("mlstm_kernels.torch.kernel_wrappers", name)
    kernel = function("mlstm_kernels.torch.parallel.native_siging.fwbw", "mlstm_siging_parallel__native_autograd")
    kernel = kernel if normalize is None else functools.partial(kernel, normalize=normalize)
    args = draw(Sizes(S=S))

    def call(*args: Tensor) -> Any:
        return wrap(kernel, None, None, **dict(zip(NAMES, args, strict=True)))

    h, (c, n, m) = compiled(call)(*args)
    wanted = mlstm_sigmoid_chunkwise(*(t.double() for t in args[:7]), normalize=normalize is None)
    assert_close([h, c, n], [wanted[0], *wanted[1]], TOLERANCE[torch.float32])
    assert not m.any()
    assert taken(call, *args).count("-> torch.ops.xlstm") == 1


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["train", "train_with_padding"])
@pytest.mark.parametrize("normalize", [True, False])
def test_a_training_backend_with_a_sigmoid_input_gate_is_replaced(mode: str, normalize: bool):
    layer = backend(chunkwise_kernel="parallel--native_siging_autograd", mode=mode, normalize_siging=normalize,
                    return_last_states=False)
    args = draw(Sizes(S=33), state=False)
    assert_close([compiled(layer)(*args)], [layer(*args)], TOLERANCE[torch.float32])
    assert taken(layer, *args).count("-> torch.ops.xlstm") == 1


def test_another_packages_sigmoid_input_gate_is_not_replaced():
    wrap = function("mlstm_kernels.torch.kernel_wrappers", "wrap_chunkwise__arbitrary_sequence_length")

    def mlstm_siging_chunkwise(q: Tensor, **given: Any) -> Any:
        return q * 2, (given["c_initial"] + 1, given["n_initial"] + 1, given["m_initial"] + 1)

    def call(*args: Tensor) -> Any:
        return wrap(mlstm_siging_chunkwise, None, None, **dict(zip(NAMES, args, strict=True)), chunk_size=64)

    args = draw(Sizes(S=64, DHHV=8))
    with pytest.warns(UserWarning, match=r"must be mlstm_kernels', got tests\..*mlstm_siging_chunkwise"):
        found = compiled(call)(*args)
    assert_close(flat(found), flat(call(*args)), 1e-6)


TRITON = {
    "mlstm_chunkwise__xl_chunk": "chunkwise.triton_xl_chunk.fwbw",
    "mlstm_chunkwise__limit_chunk": "chunkwise.triton_limit_chunk.fwbw",
    "mlstm_parallel__limit_headdim": "parallel.triton_limit_headdim.fwbw",
    "mlstm_siging_chunkwise__xl_chunk": "chunkwise.triton_xl_chunk_siging.fwbw",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRITON)
def test_triton_functions_become_operators_that_need_no_triton(name: str):
    pytest.importorskip("triton", reason="needs the package triton")
    fn, args = function(f"mlstm_kernels.torch.{TRITON[name]}", name), draw(Sizes(S=33), state=False)
    doubles = [t.double() for t in args]
    wanted = mlstm_sigmoid_chunkwise(*doubles)[0] if "siging" in name else exact(args)[0]
    assert_close([compiled(fn)(*args)], [wanted], TOLERANCE[torch.float32])
    assert taken(fn, *args).count("-> torch.ops.xlstm") == 1


@pytest.mark.slow
def test_the_triton_step_becomes_an_operator():
    pytest.importorskip("triton", reason="needs the package triton")
    fn = function("mlstm_kernels.torch.recurrent.triton_step", "mlstm_recurrent_step__triton")
    native = function("mlstm_kernels.torch.recurrent.native_step", "mlstm_recurrent_step__native")
    q, k, v, igate, fgate, *state = draw(Sizes(S=1))
    args = (q[:, :, 0], k[:, :, 0], v[:, :, 0], igate, fgate, *state)
    assert_close(flat(compiled(fn)(*args)), flat(native(*args)), PEER_TOLERANCE)


# --- xlstm ---

MLSTM = "xlstm.blocks.mlstm.backends"


@pytest.mark.smoke
def test_xlstms_parallel_mlstm_becomes_an_operator():
    fn = function(MLSTM, "parallel_stabilized_simple")
    q, k, v, igate, fgate = draw(Sizes(S=30, DHHV=8), state=False)
    args = (q, k, v, igate[..., None], fgate[..., None])
    assert_close([compiled(fn)(*args)], [fn(*args)], PEER_TOLERANCE)
    taken(fn, *args, lower_triangular_matrix=torch.ones(30, 30, dtype=torch.bool).tril())


@pytest.mark.slow
def test_xlstms_parallel_mlstm_with_another_stabilisation_is_not_replaced():
    fn = function(MLSTM, "parallel_stabilized_simple")
    q, k, v, igate, fgate = draw(Sizes(S=30, DHHV=8), state=False)
    args = (q, k, v, igate[..., None], fgate[..., None])
    with pytest.warns(UserWarning, match="stabilize_rowwise must be True, got False"):
        found = compiled(fn)(*args, stabilize_rowwise=False)
    assert_close([found], [fn(*args, stabilize_rowwise=False)], PEER_TOLERANCE)


def test_xlstms_mlstm_step_does_not_modify_its_inputs():
    fn = function(MLSTM, "recurrent_step_stabilized_simple")
    q, k, v, igate, fgate, c, n, m = draw(Sizes(S=1, DHHV=8))
    args = (c, n[..., None], m[..., None], q, k, v, igate[..., None], fgate[..., None])
    before = [t.clone() for t in args]
    found = flat(compiled(fn)(*args))
    taken(fn, *args)
    assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True))
    wanted = flat(fn(*args))  # squeezes q, k and v in place
    assert [t.shape for t in found] == [t.shape for t in wanted]
    assert_close(found, wanted, PEER_TOLERANCE)


def slstm_layer() -> Any:
    module = "xlstm.blocks.slstm.cell"
    config = function(module, "sLSTMCellConfig")(
        hidden_size=32, num_heads=2, backend="vanilla", num_states=4, dtype="float32", bias_init="standard",
        recurrent_weight_init="standard",
    )
    layer = function(module, "sLSTMCell_vanilla")(config)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.3)
    return layer


@pytest.mark.smoke
def test_xlstms_vanilla_slstm_is_one_operator_without_a_break():
    layer, x = slstm_layer(), torch.randn(3, 12, 4 * 32)
    state = torch.cat([torch.randn(2, 3, 32), torch.rand(1, 3, 32) + 0.5, torch.randn(1, 3, 32)])
    for given in ((x,), (x, state)):
        assert_close(flat(compiled(layer)(*given)), flat(layer(*given)), PEER_TOLERANCE)
    assert taken(layer, x, state).count("xlstm.slstm_sequence") == 1


@pytest.mark.slow
def test_xlstms_vanilla_slstm_keeps_its_gradients():
    layer, x = slstm_layer(), torch.randn(3, 6, 4 * 32)

    def gradients(run: Callable[..., Any]) -> list[Tensor]:
        layer.zero_grad()
        run(x)[0].square().sum().backward()
        return [parameter.grad.clone() for parameter in layer.parameters()]

    assert_close(gradients(compiled(layer)), gradients(layer), 1e-4)


def test_xlstms_vanilla_slstm_step_is_inlined():
    layer = slstm_layer()
    x, state = torch.randn(3, 1, 4 * 32), torch.cat([torch.randn(2, 3, 32), torch.rand(2, 3, 32) + 0.5])
    assert_close(flat(compiled(layer.step)(x, state)), flat(layer.step(x, state)), PEER_TOLERANCE)
    assert "xlstm.slstm_step, inlined" in taken(layer.step, x, state)


# --- flashrnn ---


@pytest.mark.slow
def test_flashrnns_vanilla_slstm_becomes_an_operator():
    run = function("flashrnn", "flashrnn")
    B, T, NH, DH = 2, 5, 2, 32
    args = (torch.randn(B, T, 4, NH, DH), torch.randn(4, NH, DH, DH) * 0.2, torch.randn(4, NH, DH))

    def call(*args: Tensor) -> Any:
        return run(*args, function="slstm", backend="vanilla", dtype="float32")

    text = torch_xlstm_ops.explain(call, *args)
    assert "flashrnn_forward" in text
    assert "-> torch.ops.xlstm.slstm_sequence" in text
    (h, last), (wanted, wanted_last) = torch.compile(call, backend="xlstm")(*args), call(*args)
    assert h.shape == wanted.shape
    assert_close([h[0], h[:, :, -1], last], [wanted[0], wanted[:, :, -1], wanted_last], PEER_TOLERANCE)
    assert h[1:, :, :-1].isnan().all()  # c, n and m before the last token are not kept


@pytest.mark.smoke
def test_flashrnns_other_cells_are_not_replaced():
    forward = function("flashrnn.flashrnn.vanilla", "flashrnn_forward")
    pointwise = importlib.import_module("flashrnn.flashrnn.vanilla").flashrnn_pointwise_function_registry["lstm"]
    args = (torch.randn(3, 2, 4, 2, 8), torch.zeros(1, 2, 2, 2, 8), torch.randn(2, 8, 4, 8), torch.randn(4, 2, 8))

    def call() -> Any:
        return forward(*args, pointwise_forward=pointwise)

    with pytest.warns(UserWarning, match="pointwise_forward must be the sLSTM's, got that of flashrnn.*lstm"):
        found = torch.compile(call, backend="xlstm")()
    assert_close(flat(found), flat(call()), PEER_TOLERANCE)
