"""Laws of whole transformers models while patched: padding, packed documents, caches, on either branch."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor

transformers = pytest.importorskip("transformers")

from tests.test_patch_transformers import LAYERS, build, decode, logits, prompt  # noqa: E402
from torch_xlstm_ops.models import DEMO_MODEL  # noqa: E402
from torch_xlstm_ops.models import transformers as adapter  # noqa: E402
from torch_xlstm_ops.patch import patch  # noqa: E402

LONG, SHORT = prompt(9, 1), prompt(5, 1)
EXACT = {"rtol": 0, "atol": 2e-6}  # float32 logits of a float64 model


def padded(side: str) -> tuple[Tensor, Tensor]:
    """Return two prompts as one batch, ids and mask."""
    pad = LONG.shape[1] - SHORT.shape[1]
    before, after = (pad, 0) if side == "left" else (0, pad)
    row = torch.nn.functional.pad(SHORT, (before, after), value=7)
    mask = torch.nn.functional.pad(torch.ones_like(SHORT), (before, after))
    return torch.cat([LONG, row]), torch.cat([torch.ones_like(LONG), mask])


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_equals_the_row_alone(side: str) -> None:
    model, (ids, mask) = build(torch.float64), padded(side)
    with patch("transformers"):
        alone = [logits(model, LONG), logits(model, SHORT)]
        for given in (mask, mask.bool(), mask.float()):
            both = logits(model, ids, attention_mask=given)
            torch.testing.assert_close(both[:1], alone[0], **EXACT)
            torch.testing.assert_close(both[1:][mask[1:] == 1], alone[1][0], **EXACT)
        assert (logits(model, ids)[1:][mask[1:] == 1] - alone[1][0]).abs().max() > 0.01 or side == "right"


def test_the_state_after_padding_is_that_of_the_row_alone() -> None:
    model, (ids, mask), more = build(torch.float64), padded("right"), prompt(3, 1)
    with patch("transformers"), torch.no_grad():
        alone = adapter.forward(model, SHORT).cache
        out = model(ids, attention_mask=mask, use_cache=True)
        cache = out.cache if hasattr(out, "cache") else out.cache_params
        for state, single in zip(adapter.layers(cache), adapter.layers(alone), strict=True):
            for both, one in zip(state, single, strict=True):
                torch.testing.assert_close(both[1:], one, rtol=1e-12, atol=1e-12)
        both = decode(model, more.expand(2, -1), cache)
        torch.testing.assert_close(both[1:], decode(model, more, alone), **EXACT)


def test_a_padded_step_leaves_its_row_as_it_is() -> None:
    model, ids = build(torch.float64), prompt(4)
    with patch("transformers"), torch.no_grad():
        cache = adapter.forward(model, ids).cache
        before = adapter.copy_row(cache, 1)
        mask = torch.tensor([[1] * 5, [1, 1, 1, 1, 0]])
        model(ids[:, :1], attention_mask=mask, **{adapter.cache_parameter(model): cache})
        after = adapter.copy_row(cache, 1)
        assert all(torch.equal(a, b) for was, now in zip(before, after, strict=True)
                   for a, b in zip(was, now, strict=True))
        assert not torch.equal(adapter.copy_row(cache, 0)[0][0], before[0][0])


@pytest.mark.parametrize("alone", [False, True], ids=["package", "model"])
def test_generate_with_left_padding_equals_each_prompt_alone(alone: bool) -> None:
    model, (ids, mask) = build(), padded("left")
    greedy = {"max_new_tokens": 8, "do_sample": False}
    with patch(model) if alone else patch("transformers"):
        both = model.generate(ids, attention_mask=mask, **greedy)[:, ids.shape[1]:]
        for row, one in zip(both, (LONG, SHORT), strict=True):
            assert torch.equal(row, model.generate(one, **greedy)[0, one.shape[1]:])


def test_a_mask_is_ignored_with_compat() -> None:
    model, (ids, mask) = build(), padded("left")
    with patch("transformers", compat=True):
        assert torch.equal(logits(model, ids, attention_mask=mask), logits(model, ids))


def gradients(model: Any, batch: list[dict[str, Tensor]]) -> list[Tensor]:
    model.zero_grad()
    for one in batch:
        model(**one, num_items_in_batch=1).loss.backward()  # the sum over the tokens
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_of_a_padded_batch_equal_those_of_its_rows(checkpointed: bool) -> None:
    model, (ids, mask) = build(torch.float64).train(), padded("left")
    if checkpointed:
        for block in model.backbone.blocks:
            block.gradient_checkpointing = True
            block._gradient_checkpointing_func = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    labels = ids.masked_fill(mask.cumsum(1) < 2, -100)  # neither padding nor the first token, which nothing predicts
    with patch("transformers"):
        wanted = gradients(model, [{"input_ids": one, "labels": one} for one in (LONG, SHORT)])
        found = gradients(model, [{"input_ids": ids, "attention_mask": mask, "labels": labels}])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # the logits are float32


def test_a_long_padded_prompt_is_read_in_the_chunks_of_the_config() -> None:
    model, (ids, mask) = build(torch.float64, max_inference_chunksize=4), padded("left")
    with patch("transformers"):
        found = logits(model, ids, attention_mask=mask, use_cache=False)
        torch.testing.assert_close(found[1:, 4:], logits(model, SHORT), **EXACT)


def test_hidden_states_of_a_padded_batch_are_collected() -> None:
    model, (ids, mask) = build(torch.float64), padded("left")
    with patch("transformers"), torch.no_grad():
        found = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
        wanted = model(SHORT, output_hidden_states=True).hidden_states
    assert len(found) == len(wanted) == LAYERS + 1
    for both, one in zip(found, wanted, strict=True):
        torch.testing.assert_close(both[1:, 4:], one)


@pytest.mark.slow
def test_a_compiled_model_heeds_a_mask() -> None:
    model, (ids, mask) = build(torch.float64), padded("left")
    with patch("transformers"):
        compiled = torch.compile(model, backend="eager")
        found = logits(compiled, ids, attention_mask=mask, use_cache=False)
        torch.testing.assert_close(found[1:, 4:], logits(model, SHORT), **EXACT)


def test_masks_are_taken_by_name_and_prompts_without_one_are_read_whole() -> None:
    """Trainer drops the columns of a data set that a forward does not name; `generate` would take id 0 for padding."""
    model, ids = build(), prompt(9)
    ids[0, 3] = model.config.pad_token_id
    wanted = model.generate(ids, max_new_tokens=4, do_sample=False)
    with patch("transformers"):
        assert "attention_mask" in inspect.signature(model.forward).parameters
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), wanted)
    assert "attention_mask" not in inspect.signature(model.forward).parameters


@pytest.mark.slow
def test_a_pipeline_of_several_prompts_writes_what_each_prompt_gives_alone() -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO_MODEL, padding_side="left")
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO_MODEL)
    write = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    prompts, options = ["import os", "def f(x):\n    return"], {"max_new_tokens": 8, "do_sample": False}
    with patch("transformers"):
        together = write(prompts, batch_size=2, **options)
        assert [found for (found,) in together] == [write(one, **options)[0] for one in prompts]


def test_masks_of_other_shapes_are_refused() -> None:
    model, ids = build(), prompt(4)
    with patch("transformers"):
        with pytest.raises(ValueError, match=r"attention_mask must be \(B, at least S\) = \(2, 4\), .* got \(2, 3\)"):
            model(ids, attention_mask=torch.ones(2, 3))
        with pytest.raises(ValueError, match=r"attention_mask must be \(B, 1, S, at least S\) = \(2, 1, 4, 4\), got"):
            model(ids, attention_mask=torch.ones(2, 1, 3, 3))
        with pytest.raises(ValueError, match="must be causal within each document"):
            model(ids, attention_mask=torch.ones(2, 1, 4, 4, dtype=torch.bool))
