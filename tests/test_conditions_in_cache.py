"""A law of conditions: a function from Inductor's cache accepts the sizes that it accepted when it was generated."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from torch_xlstm_ops.runtime import torch_internals


def conditions() -> torch_internals.Admits:
    return torch_internals.compile_raw(lambda x: (2 * x,), [["G", "4"]], [torch.ones(5, 4)], {"G": 11}, {}, {})[1]


def test_conditions_of_generated_code_hold_for_code_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo.utils import counters
    from torch._inductor import config
    from torch._inductor.graph import GraphLowering

    original, generated = GraphLowering.codegen, []

    def codegen(self: GraphLowering) -> object:
        (size, _) = self.graph_inputs["x_1"].get_size()
        self.sizevars.check_leq(4 * size, 400)  # as if more elements could not be addressed
        generated.append(self)
        return original(self)

    monkeypatch.setattr(GraphLowering, "codegen", codegen)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with config.patch(fx_graph_cache=True, fx_graph_remote_cache=False, force_disable_caches=False):
        first = conditions()
        torch._dynamo.reset()
        before = counters["inductor"]["fxgraph_cache_hit"]
        second = conditions()
    assert len(generated) == 1
    assert counters["inductor"]["fxgraph_cache_hit"] == before + 1
    for admits in (first, second):
        assert [admits({"G": size}) for size in (1, 100, 101)] == [True, True, False]
