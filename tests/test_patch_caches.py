"""Laws of the cache of a transformers model while patched: going on from it, its rows, and tokens taken back."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from transformers.models.xlstm import modeling_xlstm as peer  # noqa: E402

from tests.test_patch_transformers import build, decode, prompt  # noqa: E402
from torch_xlstm_ops.models import transformers as adapter  # noqa: E402
from torch_xlstm_ops.patch import patch  # noqa: E402

GREEDY: dict[str, Any] = {"do_sample": False}
newest = pytest.mark.skipif("cache" not in inspect.signature(peer.xLSTMModel.forward).parameters,
                            reason="needs a transformers whose generate goes on from the cache of any model")


def calls_with(model: Any, cache: Any, **options: Any) -> dict[str, Any]:
    return {adapter.cache_parameter(model): cache, "use_cache": True, **options}


def cache_of(out: Any) -> Any:
    return out.cache if hasattr(out, "cache") else out.cache_params


@newest
@pytest.mark.parametrize("given", ["whole text", "whole text and mask", "new ids", "new ids and whole mask"])
def test_generate_goes_on_from_its_own_cache(given: str) -> None:
    model, ids = build(), prompt(9)
    with patch("transformers"):
        whole = model.generate(ids, max_new_tokens=12, **GREEDY)
        first = model.generate(ids, max_new_tokens=6, return_dict_in_generate=True, **GREEDY)
        more = first.sequences if "text" in given else first.sequences[:, -1:]
        mask = {"attention_mask": torch.ones_like(first.sequences)} if "mask" in given else {}
        found = model.generate(more, cache=first.cache, max_new_tokens=6, **mask, **GREEDY)
    assert torch.equal(found[:, -6:], whole[:, -6:])


@newest
def test_generate_goes_on_from_a_padded_cache() -> None:
    model, ids, mask = build(), prompt(9), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    with patch("transformers"):
        whole = model.generate(ids, attention_mask=mask, max_new_tokens=12, **GREEDY)
        first = model.generate(ids, attention_mask=mask, max_new_tokens=6, return_dict_in_generate=True, **GREEDY)
        mask = torch.cat([mask, torch.ones(2, 6, dtype=torch.long)], 1)
        found = model.generate(first.sequences, attention_mask=mask, cache=first.cache, max_new_tokens=6, **GREEDY)
    assert torch.equal(found, whole)


@newest
def test_beams_with_a_cache_equal_beams_without() -> None:
    model, ids, mask = build(torch.float64), prompt(9), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 6, "attention_mask": mask, **GREEDY}
    with patch("transformers"):
        found = model.generate(ids, **options)
        assert torch.equal(found, model.generate(ids, use_cache=False, **options))
    assert len({tuple(row.tolist()) for row in found}) == 4


@newest
@pytest.mark.parametrize("kind", ["assistant", "lookup"])
def test_assisted_decoding_equals_greedy(kind: str) -> None:
    model, ids = build(torch.float64), prompt(9, 1)
    help_ = {"assistant_model": build(torch.float64, num_hidden_layers=1)} if kind == "assistant" else {
        "prompt_lookup_num_tokens": 3}
    with patch("transformers"):
        whole = model.generate(ids, max_new_tokens=12, **GREEDY)
        config = transformers.GenerationConfig(max_new_tokens=12, pad_token_id=0, **GREEDY, **(
            help_ if kind == "lookup" else {}))
        found = model.generate(ids, generation_config=config, **(help_ if kind == "assistant" else {}))
    assert torch.equal(found, whole)


def states(cache: Any) -> list[Tensor]:
    return [tensor for layer in adapter.layers(cache) for tensor in layer]


def test_rows_are_reordered_selected_and_repeated() -> None:
    model, ids, more = build(torch.float64), prompt(9, 3), prompt(2, 1)
    with patch("transformers"), torch.no_grad():
        cache = adapter.forward(model, ids).cache
        alone = [decode(model, more, adapter.forward(model, row[None]).cache) for row in ids]
        cache.reorder_cache(torch.tensor([2, 0, 0]))
        cache.batch_select_indices(torch.tensor([True, False, True]))
        cache.batch_repeat_interleave(2)
        assert cache.batch_size == 4
        found = decode(model, more.expand(4, -1), cache)
    torch.testing.assert_close(found, torch.cat([alone[i] for i in (2, 2, 0, 0)]), rtol=0, atol=2e-6)


@pytest.mark.parametrize("taken", [0, 1, 3, 4, 7])
def test_tokens_are_taken_back(taken: int) -> None:
    model, ids = build(torch.float64, norm_reduction_force_float32=False), prompt(16)
    mask = torch.ones_like(ids)
    mask[1, 10] = 0
    kept = 16 - taken
    with patch("transformers"), torch.no_grad():
        cache = adapter.forward(model, ids[:, :9]).cache
        wanted = cache_of(model(ids[:, :kept], attention_mask=mask[:, :kept], use_cache=True))
        cache.activate_past_recording()
        for stop in (12, 13, 16):  # a call of three tokens, one of one, one of three
            start = cache.get_seq_length()
            model(ids[:, start:stop], **calls_with(model, cache, attention_mask=mask[:, :stop]))
        cache.crop(-taken)
        assert cache.get_seq_length() == kept
    for found, expected in zip(states(cache), states(wanted), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_what_was_not_recorded_is_not_taken_back() -> None:
    model, ids = build(), prompt(9)
    with patch("transformers"), torch.no_grad():
        cache = adapter.forward(model, ids).cache
        assert not cache.is_croppable
        with pytest.raises(ValueError, match=r"cache of 9 tokens .* activate_past_recording\(\), got 8"):
            cache.crop(-1)
        cache.activate_past_recording()
        with pytest.raises(ValueError, match="only to what it recorded, from 9 on, got 8"):
            cache.crop(-1)
        before = [t.clone() for t in states(cache)]
    assert all(map(torch.equal, before, states(cache)))


def test_an_empty_cache_again() -> None:
    model, ids = build(), prompt(9)
    with patch("transformers"), torch.no_grad():
        cache = adapter.forward(model, ids).cache
        cache.reset()
        assert cache.get_seq_length() == 0
        assert torch.equal(adapter.forward(model, ids, cache).logits, adapter.forward(model, ids).logits)


def test_removal_takes_the_members_away() -> None:
    before = dict(vars(peer.xLSTMCache))
    with patch("transformers"):
        assert "crop" in vars(peer.xLSTMCache)
    assert dict(vars(peer.xLSTMCache)) == before
    assert peer.xLSTMForCausalLM._is_stateful
