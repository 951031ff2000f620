"""Laws of the adapter for transformers' xLSTM: a release that calls the cache otherwise is run all the same."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from tests.context_models import build
from torch_xlstm_ops.models import transformers as adapter

IDS = torch.arange(12).view(2, 6)


class Stub(nn.Module):
    """A model that takes and gives the cache as one release of transformers does."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def answer(self, input_ids: Tensor, cache: Any) -> Any:
        return SimpleNamespace(logits=input_ids.float(), **{self.name: [*(cache or []), input_ids]})


class New(Stub):
    def forward(self, input_ids: Tensor, cache: Any = None, use_cache: bool | None = None, **kwargs: Any) -> Any:
        assert not kwargs
        return self.answer(input_ids, cache)


class Old(Stub):
    def forward(self, input_ids: Tensor, cache_params: Any = None, use_cache: bool | None = None, **kwargs: Any) -> Any:
        assert not kwargs
        return self.answer(input_ids, cache_params)


class Neither(nn.Module):
    def forward(self, input_ids: Tensor) -> Tensor:
        return input_ids


@pytest.mark.parametrize(("model", "name"), [(New("cache"), "cache"), (Old("cache_params"), "cache_params"),
                                             (New("cache_params"), "cache"), (Old("cache"), "cache_params")],
                         ids=["new", "old", "result renamed later", "argument renamed later"])
def test_the_cache_goes_in_and_comes_out_by_the_names_that_are_there(model: Any, name: str) -> None:
    assert adapter.cache_parameter(model) == name
    out = adapter.forward(model, IDS)
    assert torch.equal(out.logits, IDS.float())
    assert len(adapter.forward(model, IDS, out.cache).cache) == 2


def test_a_forward_that_somebody_wrapped_is_seen_through() -> None:
    wrapped, opaque = Old("cache_params"), Old("cache_params")
    wrapped.forward = functools.update_wrapper(  # type: ignore[method-assign]
        functools.partial(Old.forward, wrapped), Old.forward)
    opaque.forward = lambda *args, **kwargs: Old.forward(opaque, *args, **kwargs)  # type: ignore[method-assign]
    for model in (wrapped, opaque):
        assert len(adapter.forward(model, IDS, [IDS]).cache) == 2


def test_a_model_without_a_cache_is_refused() -> None:
    with pytest.raises(TypeError, match=r"forward of Neither must take cache or cache_params, got \(self, input_ids\)"):
        adapter.forward(Neither(), IDS)


@pytest.mark.smoke
def test_a_prompt_in_two_pieces_equals_the_whole() -> None:
    model = build()
    with torch.no_grad():
        first = adapter.forward(model, IDS[:, :4], adapter.empty_cache(model, 2))
        second = adapter.forward(model, IDS[:, 4:], first.cache)
        whole = adapter.forward(model, IDS)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole.logits, rtol=1e-4, atol=1e-5)
    assert adapter.position(second.cache) == adapter.position(whole.cache) == 6
    for found, wanted in zip(adapter.tensors(second.cache), adapter.tensors(whole.cache), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.smoke
def test_a_compiled_model_is_run_as_the_model() -> None:
    model = build()
    assert adapter.cache_parameter(torch.compile(model, backend="eager")) == adapter.cache_parameter(model)


def test_the_last_position_alone_has_logits_until_the_hook_is_removed() -> None:
    model = build()
    with torch.no_grad():
        whole = adapter.forward(model, IDS).logits
        with adapter.last_position_only(model):
            last = adapter.forward(model, IDS).logits
        assert torch.equal(adapter.forward(model, IDS).logits, whole)
    assert last.shape[1] == 1
    torch.testing.assert_close(last, whole[:, -1:], rtol=1e-5, atol=1e-6)


def test_the_first_block_only_writes_its_state_alone() -> None:
    model = build()
    every = list(adapter.blocks(model))
    with torch.no_grad(), adapter.first_block_only(model):
        cache = adapter.forward(model, IDS).cache
    first, second = adapter.layers(cache)
    assert any(t.any() for t in first)
    assert not any(t.any() for t in second)
    assert list(adapter.blocks(model)) == every


def test_a_cache_holds_what_it_is_given() -> None:
    model = build()
    cache, other = adapter.empty_cache(model), adapter.empty_cache(model, 3)
    adapter.set_layers(cache, adapter.layers(other))
    assert all(a is b for a, b in zip(adapter.layers(cache)[1], adapter.layers(other)[1], strict=True))
    adapter.set_position(cache, 5)
    adapter.advance_position(cache, 2)
    assert adapter.position(cache) == 7
    plain = SimpleNamespace(seqlen_offset=0, rnn_state={})  # a release that counts in a plain number
    adapter.set_position(plain, 5)
    adapter.advance_position(plain, 2)
    assert (adapter.position(plain), adapter.tensors(plain)) == (7, [])


def test_a_model_is_one_of_transformers_if_it_says_so_and_has_a_head() -> None:
    model = build()
    assert adapter.is_causal_lm(model)
    assert not adapter.is_causal_lm(model.backbone)
    assert not adapter.is_causal_lm(Neither())
