"""Laws of a patched language model's logits: of the last tokens alone, and beyond the chunk of the config."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from tests.test_patch_models import EXACT, padded
from tests.test_patch_transformers import build, logits, prompt
from torch_xlstm_ops.patch import patch


@pytest.mark.parametrize("kept", [1, 3, torch.tensor([0, 4])], ids=["one", "three", "chosen"])
def test_kept_logits_are_those_of_all(kept: int | Tensor) -> None:
    model, (ids, mask) = build(torch.float64), padded("left")
    with patch("transformers"):
        for options in ({}, {"attention_mask": mask}):
            every, found = logits(model, ids, **options), logits(model, ids, logits_to_keep=kept, **options)
            at = slice(-kept, None) if isinstance(kept, int) else kept
            torch.testing.assert_close(found, every[:, at], rtol=0, atol=0)
        assert len(model(ids, logits_to_keep=kept, return_dict=False)[0]) == len(ids)


def test_generate_asks_for_the_logits_of_one_token() -> None:
    model, ids, sizes = build(), prompt(9), []
    wanted = model.generate(ids, max_new_tokens=3, do_sample=False)
    with patch("transformers"):
        hook = model.lm_head.register_forward_hook(lambda module, args, out: sizes.append(out.shape[1]))
        assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), wanted)
        hook.remove()
    assert sizes == [1, 1, 1]


def gradients(model: Any, ids: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.slow
def test_gradients_of_a_long_sequence_in_evaluation_equal_those_in_training() -> None:
    model, ids = build(torch.float64, max_inference_chunksize=4), prompt(9)
    with patch("transformers"):
        evaluated, trained = (gradients(model.train(mode), ids) for mode in (False, True))
    for found, wanted in zip(evaluated, trained, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_a_long_sequence_without_a_cache_keeps_its_precision() -> None:
    model, ids = build(torch.float64, max_inference_chunksize=4), prompt(9)
    with patch("transformers"):
        whole = logits(build(torch.float64), ids)
        torch.testing.assert_close(logits(model, ids, use_cache=False), whole, **EXACT)
