"""Laws of a token as one compiled call a block: changes and observers that a trace would miss have their effect."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("transformers")

from tests import test_patch_transformers as laws
from tests.test_patch_transformers import LAYERS, decode, decode_from, logits, prefill, prompt
from torch_xlstm_ops.models import transformers as adapter
from torch_xlstm_ops.patch import adapters, decoding, patch

IDS = prompt(6)
CLOSE = 1e-3  # of logits about 2, where a gate's rounding is amplified by a small denominator


def build(**options: Any) -> Any:
    """Return a model without zero weights, unlike a new one."""
    model = laws.build(**options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.05)
    return model


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Collect for each block whether a compiled call was used."""
    found: list[bool] = []

    def noting(module: nn.Module, device: str) -> Any:
        block = original(module, device)
        found.append(block is not None)
        return block

    original = decoding.traced
    monkeypatch.setattr(decoding, "traced", noting)
    return found


def after(model: Any, change: Callable[[Any], object] = lambda model: None) -> Tensor:
    """Decode a token, change the model, and return the logits of the tokens after that."""
    cache = prefill(model, IDS[:, :3]).cache
    decode(model, IDS[:, 3:4], cache)
    change(model)
    return decode(model, IDS[:, 4:], cache)


def prefill_from(model: Any, ids: Tensor, cache: Any) -> adapter.Output:
    with torch.no_grad():
        return adapter.forward(model, ids, cache)


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=CLOSE)


def first(model: Any) -> Any:
    return model.backbone.blocks[0]


@pytest.mark.parametrize("biased", [False, True])
def test_a_token_is_one_compiled_call_a_block(taken: list[bool], biased: bool) -> None:
    model = build(use_bias=biased)
    unpatched = after(model)
    with patch("transformers"):
        close(after(model), unpatched)
    assert taken == [True] * LAYERS * 3
    known = [decoding.traced(block, "cpu") for block in model.backbone.blocks]
    assert len({id(block.forward) for block in known if block}) == 1


def test_only_the_given_model_is_patched(taken: list[bool]) -> None:
    model, other = build(), build()
    unpatched = after(other)
    with patch(model):
        assert torch.equal(after(other), unpatched)
        assert not taken
        close(after(model), unpatched)
    assert taken == [True] * LAYERS * 3


def test_one_model_patched_again_is_traced_on_our_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = build(), []
    step = adapters.mlstm_step
    monkeypatch.setattr(adapters, "mlstm_step", lambda *args, **options: calls.append(args) or step(*args, **options))
    for B in (2, 3):
        before = len(calls)
        with patch(model):
            decode_from(model, prompt(4, B), 3)
        assert len(calls) == before + 1


def rescale(model: Any) -> None:
    first(model).ffn.proj_up.weight.mul_(2)


def replace_weight(model: Any) -> None:
    linear = first(model).mlstm_layer.out_proj
    linear.weight = nn.Parameter(linear.weight * 2)


def change_eps(model: Any) -> None:
    first(model).norm_ffn.eps = 1.0


def change_config(model: Any) -> None:
    for module in first(model).modules():
        if hasattr(module, "config"):
            module.config.gate_soft_cap = 1.0


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def replace_module(model: Any) -> None:
    linear = first(model).ffn.proj_down
    doubled = Doubled(linear.in_features, linear.out_features, bias=False)
    doubled.weight = linear.weight
    first(model).ffn.proj_down = doubled


def replace_forward(model: Any) -> None:
    linear = first(model).mlstm_layer.v
    original = linear.forward
    linear.forward = lambda x: 2 * original(x)


def hook(model: Any) -> None:
    first(model).ffn.proj_up.register_forward_hook(lambda module, args, result: 2 * result)


def pre_hook(model: Any) -> None:
    first(model).norm_mlstm.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def transpose(model: Any) -> None:
    linear = first(model).mlstm_layer.out_proj
    linear.weight = nn.Parameter(linear.weight.T.contiguous().T * 2)


CHANGES = {
    True: [rescale, replace_weight, change_eps, change_config],
    False: [replace_module, replace_forward, hook, pre_hook],
}


@pytest.mark.parametrize(("change", "compiled"), [(c, known) for known, all_ in CHANGES.items() for c in all_])
def test_a_change_between_tokens_has_effect(change: Callable[[Any], None], compiled: bool, taken: list[bool]) -> None:
    model = build()
    with torch.no_grad():
        unpatched, untouched = after(copy.deepcopy(model), change), after(copy.deepcopy(model))
        with patch("transformers"):
            close(after(model, change), unpatched)
    assert (unpatched - untouched).abs().max() > 10 * CLOSE
    assert taken[-2 * LAYERS:] == [compiled, *[True] * (LAYERS - 1)] * 2


def test_weights_in_another_memory_order_run_the_original() -> None:
    model = build()
    with torch.no_grad():
        unpatched = after(copy.deepcopy(model), transpose)
        with patch("transformers"):
            close(after(model, transpose), unpatched)


@contextmanager
def everywhere() -> Iterator[None]:
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, result: seen.append(module))
    try:
        yield
    finally:
        handle.remove()
    assert any(isinstance(module, nn.Linear) for module in seen)


@contextmanager
def counted() -> Iterator[None]:
    with FlopCounterMode(display=False) as counter:
        yield
    assert counter.get_total_flops() > 0


def test_states_are_written_into_the_cache_of_the_model_that_runs_and_nowhere_else() -> None:
    model = build()
    unpatched, other = (prefill(model, IDS[:, :3]).cache for _ in range(2))
    decode(model, IDS[:, 3:4], unpatched)
    with patch("transformers"), torch.no_grad():
        cache = prefill(model, IDS[:, :3]).cache
        tensors = adapter.tensors(cache)
        decode(model, IDS[:, 3:4], cache)
        assert all(a is b for a, b in zip(adapter.tensors(cache), tensors, strict=True))
        torch.testing.assert_close(adapter.tensors(cache), adapter.tensors(unpatched), rtol=1e-4, atol=1e-4)
        before, given = copy.deepcopy(adapter.layers(other)), adapter.layers(other)[0]
        _, state = first(model)(torch.randn(IDS.shape[0], 1, model.config.hidden_size), given)
        assert not {t.data_ptr() for t in state} & {t.data_ptr() for t in given}
        torch.testing.assert_close(adapter.layers(other), before, rtol=0, atol=0)


def test_a_prompt_is_one_compiled_call_a_block_whose_states_the_call_s_own_cache_keeps(
    taken: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, found, run = build(), [], decoding._run
    monkeypatch.setattr(decoding, "PROMPT", IDS[:, :3].numel())
    monkeypatch.setattr(decoding, "_run", lambda *args: found.append(run(*args)) or found[-1])
    unpatched = prefill(model, IDS[:, :3])
    further = prefill_from(model, IDS[:, 3:], unpatched.cache)
    with patch("transformers"):
        ours = prefill(model, IDS[:, :3])
        kept = [t for layer in adapter.layers(ours.cache) for t in layer]
        assert all(a is b for a, b in zip(kept, [t for _, *state in found for t in state], strict=True))
        again = prefill_from(model, IDS[:, 3:], ours.cache)
    given = [t for layer in adapter.layers(ours.cache) for t in layer]
    assert all(a is b for a, b in zip(given, kept, strict=True))
    assert taken == [True] * LAYERS * 2
    close(ours.logits, unpatched.logits)
    close(again.logits, further.logits)
    torch.testing.assert_close(adapter.layers(ours.cache), adapter.layers(unpatched.cache), rtol=1e-4, atol=1e-4)


def test_a_short_prompt_on_the_cpu_compiles_no_block(taken: list[bool]) -> None:
    with patch("transformers"):
        prefill(build(), IDS)
    assert not taken


@pytest.mark.parametrize("observer", [everywhere, counted, lambda: torch.autocast("cpu"), torch.enable_grad])
def test_every_observer_sees_the_computation(
    observer: Callable[[], Any], taken: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build()
    with patch("transformers"), torch.no_grad():
        cache = prefill(model, IDS[:, :3]).cache
        twin = copy.deepcopy(cache)
        with observer():
            found = adapter.forward(model, IDS[:, 3:4], cache).logits
        assert not taken
        monkeypatch.setattr(decoding, "_compiles", lambda x, state: False)
        with observer():
            assert torch.equal(adapter.forward(model, IDS[:, 3:4], twin).logits, found)


def test_hidden_states_equal_unpatched() -> None:
    model = build()

    def states() -> list[Tensor]:
        cache = prefill(model, IDS[:, :3]).cache
        with torch.no_grad():
            out = model(IDS[:, 3:4], **{adapter.cache_parameter(model): cache}, output_hidden_states=True)
        return list(out.hidden_states)

    unpatched = states()
    with patch("transformers"):
        torch.testing.assert_close(states(), unpatched, rtol=1e-4, atol=1e-4)


def test_gradients_are_checkpointed_as_unpatched() -> None:
    model = build(mode="train").train()
    calls: list[object] = []

    def checkpoint(function: Callable[..., Any], *args: Any) -> Any:
        calls.append(function)
        return function(*args)

    for block in model.backbone.blocks:
        block.gradient_checkpointing, block._gradient_checkpointing_func = True, checkpoint
    with patch("transformers"):
        model(prompt(64), use_cache=False)
    assert len(calls) == LAYERS


def test_a_decoded_model_is_freed() -> None:
    model = build()
    with patch("transformers"):
        decode_from(model, IDS, 3)
    block = weakref.ref(first(model))
    del model
    gc.collect()
    assert block() is None


@pytest.mark.slow
def test_another_batch_and_another_model_are_compiled_calls() -> None:
    model, wider = build(), build(num_heads=4)
    unpatched = [logits(m, ids) for m in (model, wider) for ids in (prompt(4, 1), prompt(4, 3))]
    with patch("transformers"):
        found = [decode_from(m, ids, 2) for m in (model, wider) for ids in (prompt(4, 1), prompt(4, 3))]
    for a, b in zip(found, unpatched, strict=True):
        close(a, b)
