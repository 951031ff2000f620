"""Laws of shards of a prompt in a patched model of transformers, read in this process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from tests.oracle import assert_close
from tests.test_parallel import LocalLink
from tests.test_patch_transformers import LAYERS, build, prefill, prompt
from torch_xlstm_ops.parallel import models
from torch_xlstm_ops.parallel.sequence_parallel import MLSTM, SequenceParallelMode
from torch_xlstm_ops.patch import decoding, patch

IDS = prompt(6)


@pytest.mark.parametrize("summarize_first", [False, True])
def test_blocks_read_their_shards_as_one_compiled_call_each(
    summarize_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[int] = []

    def noting(module: nn.Module, inputs: Any, in_place: bool = False) -> Any:
        found = original(module, inputs, in_place)
        compiled.append(0 if found is None else inputs[0].shape[1])
        return found

    original = decoding._run
    monkeypatch.setattr(decoding, "_run", noting)
    monkeypatch.setattr(decoding, "PROMPT", IDS[:, :3].numel())
    model, link = build(), LocalLink()
    models.prepare_transformers(model)
    with patch(model):
        wanted = prefill(model, IDS).logits[:, -1]
        compiled.clear()
        for number, part in enumerate(IDS.split(3, 1)):
            mode = SequenceParallelMode(link, first=number == 0, last=number == 1, summarize_first=summarize_first)
            with torch.inference_mode(), mode:
                found, _ = models.transformers_call(model, part, 3 * number)
            assert mode.calls == [MLSTM] * LAYERS
    assert compiled == [3] * 2 * LAYERS
    assert_close([found], [wanted], 1e-4)


def test_a_shard_of_one_token_is_not_compiled_as_a_step() -> None:
    model, link = build(), LocalLink()
    models.prepare_transformers(model)
    mode = SequenceParallelMode(link, first=True, last=True, summarize_first=False)
    with patch(model), torch.inference_mode(), mode, pytest.raises(NotImplementedError, match="mlstm_step"):
        models.transformers_call(model, IDS[:, :1], 0)
