"""Laws of sampling, and of text that is decoded token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_xlstm_ops.cli.generation import sampling

pytestmark = pytest.mark.usefixtures("one_thread")


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, token_ids: Any, *, skip_special_tokens: bool) -> str:
        return bytes(token_ids).decode("utf-8", errors="replace")


@settings(deadline=None)
@given(st.text(max_size=30), st.text(max_size=30))
def test_streamed_text_is_the_whole_text(prompt: str, text: str) -> None:
    stream = sampling.TextStream(Bytes(), list(prompt.encode()))
    parts = [stream.push(token) for token in text.encode()]
    assert "".join(parts) + stream.flush() == text
    assert all("\ufffd" not in part for part in parts) or "\ufffd" in text


@settings(deadline=None)
@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_streamed_text_ends_before_the_first_stop(text: str, stops: list[str]) -> None:
    stream = sampling.TextStream(Bytes(), [], stops)
    shown = ""
    for token in text.encode():
        shown += stream.push(token)
        if stream.stopped:
            break
    shown += stream.flush()
    ends = [at for at in map(text.find, stops) if at >= 0]
    assert stream.stopped == bool(ends)
    if ends:
        assert not any(stop in shown for stop in stops)
        assert text.startswith(shown)
        assert any(text.startswith(stop, len(shown)) for stop in stops)
    else:
        assert shown == text


def test_broken_characters_are_shown_sooner_or_later() -> None:
    stream = sampling.TextStream(Bytes(), [])
    assert "".join(stream.push(0xFF) for _ in range(20)) + stream.flush() == "\ufffd" * 20


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.floats(0.01, 1.0))
def test_candidates_are_the_likeliest_and_no_more_than_needed(seed: int, top_k: int, top_p: float) -> None:
    logits = torch.randn(30, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weights = sampling.candidates(logits, top_k, top_p)
    assert weights.sum().item() == pytest.approx(1.0)
    kept = int((weights > 0).sum())
    assert 1 <= kept <= min(top_k, 30)
    ordered = logits.sort(descending=True)
    assert set(ordered.indices[:kept].tolist()) == set(weights.nonzero().flatten().tolist())
    of_top_k = ordered.values[:top_k].softmax(-1)
    assert of_top_k[: kept - 1].sum() < top_p + 1e-9


def test_temperature_zero_takes_the_likeliest() -> None:
    assert sampling.chooser(temperature=0.0)(torch.tensor([0.0, 3.0, 2.0])) == 1
