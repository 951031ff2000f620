"""Laws of packed documents in a transformers model while patched: they equal the documents one by one."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from tests.test_patch_models import EXACT, gradients  # noqa: E402
from tests.test_patch_transformers import build, logits, prompt  # noqa: E402
from torch_xlstm_ops.models import transformers as adapter  # noqa: E402
from torch_xlstm_ops.patch import patch  # noqa: E402

COUNTS = (5, 1, 9)
DOCUMENTS = [prompt(count, 1) for count in COUNTS]
PACKED = torch.cat(DOCUMENTS, 1)
NUMBERS = torch.cat([torch.full((1, count), number + 1) for number, count in enumerate(COUNTS)], 1)
ENDS = torch.tensor([0, *itertools.accumulate(COUNTS)], dtype=torch.int32)
SEES = (NUMBERS[:, :, None] == NUMBERS[:, None])[:, None].tril()  # (1, 1, S, S)
POSITIONS = torch.cat([torch.arange(count) for count in COUNTS])[None]
FORMS: dict[str, dict[str, Tensor]] = {
    "positions": {"position_ids": POSITIONS},
    "positions of one row": {"position_ids": POSITIONS[0]},
    "positions and a mask": {"position_ids": POSITIONS, "attention_mask": torch.ones_like(PACKED)},
    "numbers": {"seq_idx": NUMBERS - 1},
    "numbers as a mask": {"attention_mask": NUMBERS},
    "ends": {"cu_seq_lens_q": ENDS, "cu_seq_lens_k": ENDS, "max_length_q": 9, "max_length_k": 9},
    "ends by our name": {"cu_seqlens": ENDS},
    "a square mask": {"attention_mask": SEES},
    "a square mask to add": {"attention_mask": torch.zeros(1, 1, 15, 15).masked_fill(~SEES, -3e38)},
}


def one_by_one(model: Any) -> Tensor:
    return torch.cat([logits(model, document) for document in DOCUMENTS], 1)


@pytest.mark.parametrize("form", FORMS)
def test_packed_documents_equal_them_one_by_one(form: str) -> None:
    model = build(torch.float64)
    with patch("transformers"):
        wanted = one_by_one(model)
        torch.testing.assert_close(logits(model, PACKED, **FORMS[form]), wanted, **EXACT)
        assert (logits(model, PACKED) - wanted).abs().max() > 0.01


def test_rows_of_other_documents_and_padding() -> None:
    model, S = build(torch.float64), PACKED.shape[1]
    ids = torch.cat([PACKED, torch.nn.functional.pad(PACKED[:, 5:], (3, 2))])
    numbers = torch.cat([NUMBERS, torch.nn.functional.pad(NUMBERS[:, 5:], (3, 2))])
    positions = torch.cat([POSITIONS, torch.nn.functional.pad(POSITIONS[:, 5:], (3, 2), value=1)])
    with patch("transformers"):
        wanted = one_by_one(model)
        for given in ({"attention_mask": numbers}, {"attention_mask": (numbers > 0).long(), "position_ids": positions}):
            found = logits(model, ids, **given)
            torch.testing.assert_close(found[:1], wanted, **EXACT)
            torch.testing.assert_close(found[1:, 3 : S - 2], wanted[:, 5:], **EXACT)


@pytest.mark.slow
def test_gradients_of_packed_documents_equal_those_of_them_one_by_one() -> None:
    model = build(torch.float64).train()
    firsts = POSITIONS == 0
    with patch("transformers"):
        wanted = gradients(model, [{"input_ids": d, "labels": d} for d in DOCUMENTS if d.shape[1] > 1])
        labels = PACKED.masked_fill(firsts, -100)
        found = gradients(model, [{"input_ids": PACKED, "labels": labels, "position_ids": POSITIONS}])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # the logits are float32


def test_the_collator_that_flattens_gives_what_is_heeded() -> None:
    model = build(torch.float64)
    for options in ({}, {"return_flash_attn_kwargs": True}, {"return_seq_idx": True}):
        collate = transformers.DataCollatorWithFlattening(return_tensors="pt", **options)
        batch = collate([{"input_ids": document[0].tolist()} for document in DOCUMENTS])
        with patch("transformers"):
            torch.testing.assert_close(logits(model, batch.pop("input_ids"), **batch), one_by_one(model), **EXACT)


def test_a_call_that_goes_on_begins_a_document_where_positions_begin() -> None:
    model = build(torch.float64)
    first, second = DOCUMENTS[0], DOCUMENTS[2]
    with patch("transformers"), torch.no_grad():
        before = {adapter.cache_parameter(model): adapter.forward(model, first).cache}
        fresh = model(second[:, :4], position_ids=torch.arange(4)[None], **before).logits
        on = model(second[:, 4:5], position_ids=torch.tensor([[4]]), **before).logits
        torch.testing.assert_close(torch.cat([fresh, on], 1).double(), logits(model, second)[:, :5], **EXACT)
        fresh = model(second[:, :1], position_ids=torch.tensor([[0]]), **before).logits
        torch.testing.assert_close(fresh.double(), logits(model, second)[:, :1], **EXACT)


def test_documents_of_wrong_shapes_are_refused() -> None:
    model = build()
    with patch("transformers"):
        with pytest.raises(ValueError, match=r"position_ids must be \(B, S\) = \(1, 15\), got \(1, 3\)"):
            model(PACKED, position_ids=torch.arange(3)[None])
        with pytest.raises(ValueError, match=r"cu_seqlens must be \(documents \+ 1,\) and the batch one row, got"):
            model(PACKED.expand(2, -1), cu_seqlens=ENDS)
