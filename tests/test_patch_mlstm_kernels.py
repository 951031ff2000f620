"""Laws of the mlstm_kernels drop-in, judged by the package itself and the float64 recurrence."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.oracle import Sizes, assert_close, draw, exact, weigh
from tests.parameters import tail
from torch_xlstm_ops.patch import patch

pytest.importorskip("mlstm_kernels", reason="needs the package mlstm_kernels")

from mlstm_kernels.torch import get_mlstm_kernel, get_mlstm_sequence_kernel, get_mlstm_step_kernel
from mlstm_kernels.torch.backend_module import mLSTMBackend, mLSTMBackendConfig

NAMES = ("q", "k", "v", "i", "f", "c_initial", "n_initial", "m_initial")
TRITON = {"chunkwise_kernel": "chunkwise--triton_limit_chunk", "sequence_kernel": "native_sequence__triton",
          "step_kernel": "triton"}
OURS = {"chunkwise_kernel": "chunkwise--xlstm_ops", "sequence_kernel": "native_sequence__xlstm_ops",
        "step_kernel": "xlstm_ops"}


def backend(**options: Any) -> Any:
    return mLSTMBackend(mLSTMBackendConfig(**{"chunk_size": 16, "mode": "inference", **options}))


def run(module: Any, args: list[Tensor], **options: Any) -> Any:
    return module(**dict(zip(NAMES, args, strict=False)), **options)


@pytest.mark.smoke
@pytest.mark.parametrize("S", [1, 2, 15, 16, 33])
@pytest.mark.parametrize("mode", ["train", "inference"])
def test_existing_backends_equal_their_unpatched_selves(mode: str, S: int) -> None:
    module, args = backend(mode=mode), draw(Sizes(S=S))
    with patch("mlstm_kernels"):
        h, state = run(module, args)
    assert_close([h, *state], exact(args), 1e-5)
    if S % 16 == 0 or mode == "inference":  # the peer's own training wants whole chunks
        theirs, their_state = run(module, args)
        assert_close([h, *state], [theirs, *their_state], 1e-4)


def test_what_is_returned_follows_mode_and_request() -> None:
    args = draw(Sizes(S=16))
    for mode, asked, states in [("train", None, True), ("train", False, False), ("inference", False, True)]:
        with patch("mlstm_kernels"):
            ours = run(backend(mode=mode), args, return_last_states=asked)
        theirs = run(backend(mode=mode), args, return_last_states=asked)
        assert isinstance(ours, tuple) is isinstance(theirs, tuple) is states


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA the Triton kernels stay theirs")
def test_triton_configs_build_and_run_without_cuda() -> None:
    args = draw(Sizes(S=33))
    with patch("mlstm_kernels"):
        module = backend(**TRITON)
        h, state = run(module, args)
        for name in ("triton_limit_chunk", "triton_xl_chunk"):
            assert_close([get_mlstm_kernel(f"chunkwise--{name}")(*args, chunk_size=64)], exact(args)[:1], 1e-5)
    assert_close([h, *state], exact(args), 1e-5)
    again, _ = run(module, args)  # it was built with ours, and keeps it
    assert_close([again], exact(args)[:1], 1e-5)


@pytest.mark.smoke
@pytest.mark.parametrize("chunkwise", tail(["xlstm_ops", "xlstm_ops_queued"]))
def test_configs_may_name_ours(chunkwise: str) -> None:
    args = draw(Sizes(S=33))
    with patch("mlstm_kernels"):
        h, state = run(backend(**{**OURS, "chunkwise_kernel": f"chunkwise--{chunkwise}"}), args)
        kernels = get_mlstm_kernel(f"chunkwise--{chunkwise}"), get_mlstm_sequence_kernel(OURS["sequence_kernel"])
        for kernel in kernels:
            found, after = kernel(**dict(zip(NAMES, args, strict=True)), return_last_states=True, chunk_size=64)
            assert_close([found, *after], exact(args), 1e-5)
    assert_close([h, *state], exact(args), 1e-5)
    with pytest.raises(ValueError, match="Unknown"):
        get_mlstm_kernel(f"chunkwise--{chunkwise}")


def test_the_step_kernel_is_one_token_of_the_sequence() -> None:
    args = draw(Sizes(S=1))
    with patch("mlstm_kernels"):
        step = get_mlstm_step_kernel("xlstm_ops")
    q, k, v, i, f, c, n, m = args
    h, state = step(q=q[:, :, 0], k=k[:, :, 0], v=v[:, :, 0], i=i, f=f, c=c, n=n, m=m)
    assert_close([h[:, :, None], *state], exact(args), 1e-5)


def gradients(module: Any, args: list[Tensor]) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in args[:5]]
    weigh([run(module, leaves)[0]]).backward()
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


@pytest.mark.slow  # its gradients in float64 are compiled for it alone
def test_gradients_include_the_normalisers_unless_compat() -> None:
    args = draw(Sizes(S=16), torch.float64, state=False)
    right = gradients(backend(mode="train", chunkwise_kernel="chunkwise--native_autograd"), args)
    module = backend(mode="train", chunkwise_kernel="chunkwise--native_custbw")
    theirs = gradients(module, args)
    with patch("mlstm_kernels"):
        assert_close(gradients(module, args), right, 1e-6)
    with patch("mlstm_kernels", compat=True):
        assert_close(gradients(module, args), theirs, 1e-10)
        if not torch.cuda.is_available():
            assert_close(gradients(backend(**{**TRITON, "mode": "train"}), args), theirs, 1e-10)
    assert max(float((a - b).norm() / b.norm()) for a, b in zip(theirs, right, strict=True)) > 0.1


def test_states_stay_float32_unless_compat() -> None:
    module, args = backend(mode="train"), draw(Sizes(S=16), torch.bfloat16, state=False)
    theirs = run(module, args)[1]
    with patch("mlstm_kernels"):
        assert {t.dtype for t in run(module, args)[1]} == {torch.float32}
    with patch("mlstm_kernels", compat=True):
        assert [t.dtype for t in run(module, args)[1]] == [t.dtype for t in theirs] == [torch.bfloat16] * 3


@pytest.mark.parametrize("S", [1, 16])
def test_states_take_a_dtype_that_the_config_names(S: int) -> None:
    module, args = backend(inference_state_dtype="bfloat16"), draw(Sizes(S=S))
    with patch("mlstm_kernels"):
        assert {t.dtype for t in run(module, args)[1]} == {torch.bfloat16}
        assert {t.dtype for t in run(module, args, mode="train")[1]} == {torch.float32}


def test_results_alias_no_input() -> None:
    """xlstm_large copies new states over the ones it passed."""
    module, args = backend(), draw(Sizes(S=1))
    with patch("mlstm_kernels"):
        wanted = [t.clone() for t in run(module, args)[1]]
        state = args[5:]
        for _ in range(2):
            after = run(module, [*args[:5], *state])[1]
            assert not {t.data_ptr() for t in after} & {t.data_ptr() for t in state}
        assert all(torch.equal(a, b) for a, b in zip(after, wanted, strict=True))


@pytest.mark.parametrize("kernel", ["parallel--native_siging_autograd", "parallel--native_siging_custbw"])
def test_sigmoid_gated_backends_equal_their_unpatched_selves(kernel: str) -> None:
    args = draw(Sizes(S=16), state=False)
    module = backend(mode="train", chunkwise_kernel=kernel, return_last_states=False)
    theirs = run(module, args)
    with patch("mlstm_kernels"):
        assert_close([run(module, args)], [theirs], 1e-5)
    with patch("mlstm_kernels", compat=True):
        assert torch.equal(run(module, args), theirs)


@pytest.mark.parametrize("normalize", tail([True, False]))
def test_sigmoid_gated_backends_go_on_from_their_state(normalize: bool) -> None:
    args = draw(Sizes(S=33), state=False)
    with patch("mlstm_kernels"):
        module = backend(chunkwise_kernel="chunkwise--native_autograd", normalize_siging=normalize)
        module.config.chunkwise_kernel = "chunkwise--triton_xl_chunk_siging"
        whole, final = run(module, args)
        first, state = run(module, [t[:, :, :20] for t in args])
        second, after = run(module, [*(t[:, :, 20:] for t in args), *state])
    assert len(after) == 3
    assert_close([torch.cat([first, second], 2), *after], [whole, *final], 1e-5)
    theirs = get_mlstm_kernel("parallel--native_siging_autograd")(*args, normalize=normalize)
    assert_close([whole], [theirs], 1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA the Triton kernels stay theirs")
@pytest.mark.parametrize("before", [True, False], ids=["imported before", "imported while patched"])
def test_triton_functions_by_name_run_without_cuda(before: bool) -> None:
    pytest.importorskip("triton", reason="needs the package triton")

    def imported() -> list[Any]:
        from mlstm_kernels.torch.chunkwise.triton_limit_chunk import mlstm_chunkwise__limit_chunk
        from mlstm_kernels.torch.chunkwise.triton_xl_chunk import mlstm_chunkwise__xl_chunk
        from mlstm_kernels.torch.chunkwise.triton_xl_chunk_siging import mlstm_siging_chunkwise__xl_chunk
        from mlstm_kernels.torch.parallel.triton_limit_headdim import mlstm_parallel__limit_headdim
        from mlstm_kernels.torch.recurrent.triton_step import mlstm_recurrent_step__triton

        return [mlstm_chunkwise__limit_chunk, mlstm_chunkwise__xl_chunk, mlstm_parallel__limit_headdim,
                mlstm_siging_chunkwise__xl_chunk, mlstm_recurrent_step__triton]

    functions = imported() if before else []
    args = draw(Sizes(S=33))
    with patch("mlstm_kernels"):
        *chunks, parallel, sigmoid, step = functions or imported()
        for function in chunks:
            h, state = function(*args, return_last_states=True, chunk_size=64, eps=1e-6)
            assert_close([h, *state], exact(args), 1e-5)
        assert_close([parallel(*args[:5])], exact([*args[:5], *map(torch.zeros_like, args[5:])])[:1], 1e-5)
        q, k, v, i, f, *state = draw(Sizes(S=1))
        h, after = step(q[:, :, 0], k[:, :, 0], v[:, :, 0], i, f, *state)
        assert_close([h[:, :, None], *after], exact([q, k, v, i, f, *state]), 1e-5)
        for normalize in (True, False):
            h, _state = sigmoid(*args[:5], return_last_states=True, normalize=normalize)
            theirs = get_mlstm_kernel("parallel--native_siging_autograd")(*args[:5], normalize=normalize)
            assert_close([h], [theirs], 1e-5)


def test_a_backend_built_while_patched_is_pickled_by_name() -> None:
    args = draw(Sizes(S=20))
    with patch("mlstm_kernels"):
        module = backend(**OURS)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    loaded = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert torch.equal(run(loaded, args)[0], run(module, args)[0])
