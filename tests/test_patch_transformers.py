"""Laws of the transformers drop-in, on the branch that transformers chose (its own classes or those of xlstm)."""

from __future__ import annotations

import copy
import importlib.metadata
import io
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from transformers.models.xlstm import modeling_xlstm as peer  # noqa: E402

from tests import together  # noqa: E402
from tests.parameters import tail  # noqa: E402
from torch_xlstm_ops.models import transformers as adapter  # noqa: E402
from torch_xlstm_ops.patch import Upstream, adapters, patch, upstream  # noqa: E402

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
LAYERS, VOCABULARY = 2, 61


def build(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Return a small model whose gates depend on the token, unlike a freshly initialised one's."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": LAYERS, "num_heads": 2, "qk_dim_factor": 1.0,
        "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": None,
    }
    model = transformers.xLSTMForCausalLM(transformers.xLSTMConfig(**settings | options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate_preact.weight" in name:
                parameter.normal_(std=0.3)
            if "igate_preact.bias" in name:
                parameter.normal_()
    return model.to(dtype)


def prompt(S: int, B: int = 2) -> Tensor:
    return torch.randint(VOCABULARY, (B, S), generator=torch.Generator().manual_seed(S))


def logits(model: Any, ids: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(ids, **options).logits.double()
    return result


def prefill(model: Any, ids: Tensor) -> adapter.Output:
    with torch.no_grad():
        return adapter.forward(model, ids)


def decode(model: Any, ids: Tensor, cache: Any) -> Tensor:
    """Return the logits of `ids`, fed one by one."""
    with torch.no_grad():
        steps = [adapter.forward(model, column, cache).logits for column in ids.split(1, dim=1)]
    return torch.cat(steps, 1).double()


def decode_from(model: Any, ids: Tensor, S: int) -> Tensor:
    """Prefill S tokens, decode the rest one by one, and return the logits of all."""
    out = prefill(model, ids[:, :S])
    return torch.cat([out.logits.double(), decode(model, ids[:, S:], out.cache)], 1)


def assert_no_worse(patched: Tensor, unpatched: Tensor, exact: Tensor) -> None:
    """Check that the patched model is as close to float64 as the original, up to a factor for chance.

    The peer's float64 model still keeps float32 states and returns float32 logits: hence the floor.
    """
    own, theirs = ((x - exact).abs().max().item() for x in (patched, unpatched))
    assert own <= 2 * theirs + 1e-5 * max(1.0, exact.abs().max().item()), (own, theirs)


@pytest.fixture(autouse=True)
def left_unpatched() -> Iterator[None]:
    before = [dict(vars(owner)) for owner in owners()]
    yield
    assert [dict(vars(owner)) for owner in owners()] == before


def owners() -> list[type]:
    if peer.external_xlstm:
        from mlstm_kernels.torch.backend_module import mLSTMBackend

        return [peer.xLSTMCache, mLSTMBackend, peer.xLSTMBlock]
    return [peer.xLSTMCache, peer.xLSTMBackend, peer.xLSTMBlock]


@pytest.mark.smoke
@pytest.mark.parametrize("S", tail([65, 1, 2, 63, 64, 200]))
@pytest.mark.parametrize("dtype", tail(DTYPES, lambda t: t != torch.float64))
def test_patched_logits_equal_unpatched(dtype: torch.dtype, S: int) -> None:
    model, ids = build(dtype), prompt(S)
    exact, unpatched = logits(build(torch.float64), ids), logits(model, ids)
    with patch("transformers"):
        assert_no_worse(logits(model, ids), unpatched, exact)


@pytest.mark.parametrize("dtype", tail(DTYPES, lambda t: t == torch.float32))
def test_prefill_then_decode_equals_whole(dtype: torch.dtype) -> None:
    model, ids = build(dtype), prompt(40)
    exact = logits(build(torch.float64), ids)
    unpatched = decode_from(model, ids, 33)
    with patch("transformers"):
        assert_no_worse(decode_from(model, ids, 33), unpatched, exact)


def gradients(dtype: torch.dtype, mode: str, S: int, **options: Any) -> dict[str, Tensor]:
    model = build(dtype, mode=mode).train()
    model(prompt(S), **options).logits.square().mean().backward()
    return {name: parameter.grad.double() for name, parameter in model.named_parameters()}


@pytest.mark.smoke
@pytest.mark.parametrize(("mode", "S"), tail([("train", 64), ("inference", 70), ("inference", 1)], 0))
def test_gradients_equal_unpatched(mode: str, S: int) -> None:
    exact, unpatched = (gradients(dtype, mode, S, use_cache=False) for dtype in (torch.float64, torch.float32))
    with patch("transformers"):
        for use_cache in (False, True):  # the peer's own training fails with a cache, which it overwrites in place
            patched = gradients(torch.float32, mode, S, use_cache=use_cache)
            for name, expected in exact.items():
                assert_no_worse(patched[name], unpatched[name], expected)


@pytest.mark.smoke
def test_generate_equals_unpatched() -> None:
    model, ids = build(), prompt(20)
    unpatched = model.generate(ids, max_new_tokens=12, do_sample=False)
    with patch("transformers"):
        assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), unpatched)


def test_removal_restores_every_bit() -> None:
    model, ids = build(torch.bfloat16), prompt(40)
    before = decode_from(model, ids, 33)
    with patch("transformers"):
        decode_from(model, ids, 33)
        built_while_patched = build(torch.bfloat16)
    assert torch.equal(decode_from(model, ids, 33), before)
    assert torch.equal(decode_from(built_while_patched, ids, 33), before)


def test_models_built_before_and_after_agree() -> None:
    before, ids = build(), prompt(40)
    with patch("transformers"):
        assert torch.equal(decode_from(build(), ids, 33), decode_from(before, ids, 33))


def test_a_prompt_and_a_token_with_gradients_are_one_op_call_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = build(), []

    def counting(name: str, op: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            calls.append(name)
            return op(*args, **options)

        return call

    for name in ("mlstm_chunkwise", "mlstm_step"):
        monkeypatch.setattr(adapters, name, counting(name, getattr(adapters, name)))
    with patch("transformers"):
        cache = prefill(model, prompt(99)).cache
        adapter.forward(model, prompt(1), cache)
    assert calls == ["mlstm_chunkwise"] * LAYERS + ["mlstm_step"] * LAYERS


@pytest.mark.parametrize("dtype", tail([torch.bfloat16, torch.float16, torch.float32]))
def test_states_stay_float32_between_calls(dtype: torch.dtype) -> None:
    model, ids = build(dtype), prompt(40)
    with patch("transformers"):
        cache = prefill(model, ids[:, :33]).cache
        decode(model, ids[:, 33:], cache)
    c, n, m = adapter.layers(cache)[0]
    assert c.dtype == n.dtype == m.dtype == torch.float32
    assert cache.dtype == dtype
    assert dtype == torch.float32 or not torch.equal(c, c.to(dtype).float())


def test_a_cache_made_while_patched_outlives_the_patch() -> None:
    model, ids = build(torch.bfloat16), prompt(40)
    exact, unpatched = logits(build(torch.float64), ids)[:, 33:], decode_from(model, ids, 33)[:, 33:]
    with patch("transformers"):
        cache = prefill(model, ids[:, :33]).cache
    assert_no_worse(decode(model, ids[:, 33:], cache), unpatched, exact)


def test_prompts_beyond_the_original_chunk_equal_one_pass() -> None:
    ids = prompt(150)
    model, whole = build(max_inference_chunksize=64), logits(build(), ids)
    with patch("transformers"):
        torch.testing.assert_close(logits(model, ids), whole, rtol=1e-4, atol=1e-4)


def test_handles_nest_in_any_order() -> None:
    original = vars(owners()[1])["forward"]
    first, second = patch("transformers"), patch("transformers")
    ours = vars(owners()[1])["forward"]
    first.remove()
    first.remove()
    assert vars(owners()[1])["forward"] is ours is not original
    assert first.report() == ()
    assert len(second.report()) >= len(owners())
    second.remove()
    assert vars(owners()[1])["forward"] is original


def test_bare_patch_finds_transformers() -> None:
    with patch() as handle:
        assert any("xLSTMCache.__init__" in line for line in handle.report())


def test_removal_refuses_if_other_code_replaced_the_attribute(monkeypatch: pytest.MonkeyPatch) -> None:
    owner = owners()[1]
    handle = patch("transformers")
    with monkeypatch.context() as context:
        context.setattr(owner, "forward", lambda self: None)
        with pytest.raises(RuntimeError, match=r"Backend\.forward was replaced by other code after patch\(\)"):
            handle.remove()
        assert handle.report()
    handle.remove()


def test_compiled_models_follow_patch_and_removal() -> None:
    model, ids = build(), prompt(64)
    compiled = torch.compile(model, backend="eager")
    unpatched = logits(compiled, ids, use_cache=False)
    with patch("transformers"):
        patched = logits(compiled, ids, use_cache=False)
        assert torch.equal(patched, logits(model, ids, use_cache=False))
    assert torch.equal(logits(compiled, ids, use_cache=False), unpatched)
    assert not torch.equal(patched, unpatched)


@pytest.mark.parametrize("copies", [True, False], ids=["deepcopy", "pickle"])
def test_copies_made_while_patched_work_after_removal(copies: bool) -> None:
    model, ids = build(), prompt(40)
    unpatched = logits(model, ids)
    with patch("transformers"):
        patched = logits(model, ids)
        if copies:
            twin = copy.deepcopy(model)
        else:
            buffer = io.BytesIO()
            torch.save(model, buffer)
            twin = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
        assert torch.equal(logits(twin, ids), patched)
    assert torch.equal(logits(twin, ids), unpatched)


def test_threads_may_patch_and_remove_while_others_run() -> None:
    model, ids = build(), prompt(40)
    expected = logits(model, ids)
    start = threading.Barrier(4)

    def work() -> None:
        start.wait(60)
        for _ in range(5):
            with patch("transformers"):
                torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=1e-4)

    together.run([work] * 4)


def test_errors_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"must be one of transformers, mlstm_kernels, .*, got 'tranformers'"):
        patch("tranformers")
    absent = {"no_such_package": Upstream("nowhere", "no-such-package", (3, 1), (3, 2), "no_such_package")}
    known = upstream.PACKAGES
    monkeypatch.setattr(upstream, "PACKAGES", absent)
    with pytest.raises(ImportError, match=r"no_such_package is not installed: pip install 'no-such-package>=3.1'"):
        patch("no_such_package")
    with pytest.raises(ImportError, match=r"there is nothing to patch: pip install 'no-such-package>=3.1'"):
        patch()
    monkeypatch.setattr(upstream, "PACKAGES", known)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "4.57.1")
    with pytest.raises(RuntimeError, match=r"transformers must be transformers>=5.17, got 4.57.1: pip install"):
        patch("transformers")


def test_an_unfamiliar_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, query: Tensor) -> Tensor:
        return query

    with monkeypatch.context() as context:
        context.setattr(owners()[1], "forward", forward)
        with pytest.raises(RuntimeError, match=r"must take \(self, .*mode\) to be patched, got \(self, query\)"):
            patch("transformers")
