"""The submissions of a transformers model on MPS, by kind: the table that docs/mps.md quotes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .jobs import Job, Reports, job
from .submissions import KINDS
from .test_upstream_bugs import check_products

pytest.importorskip("transformers")

TEXT = (Path(__file__).parents[2] / "torch_xlstm_ops/docs/mps.md").read_text()
TOKEN, BLOCK_TOKEN = 60, {"embedded": 9, "7B": 12}  # most submissions of a token
BLOCK_PROMPT = 40  # of a prompt
TABLE = {  # kernels, products, copies, fills, other: in the whole model, and in one block
    ("embedded", "float32", "token"): ([56, 1, 0, 0, 2], [9, 0, 0, 0, 0]),
    ("embedded", "bfloat16", "token"): ([56, 1, 1, 0, 2], [9, 0, 0, 0, 0]),
    ("7B", "bfloat16", "token"): ([20, 1, 1, 0, 2], [9, 0, 0, 0, 0]),
    ("embedded", "float32", "prompt"): ([110, 97, 12, 2, 2], [18, 16, 2, 0, 0]),
    ("embedded", "bfloat16", "prompt"): ([110, 97, 25, 2, 2], [18, 16, 4, 0, 0]),
    ("7B", "bfloat16", "prompt"): ([42, 33, 9, 2, 2], [20, 16, 4, 0, 0]),
}
IN_THE_GATE = ("embedded", "float32", "token")
CASES = [
    pytest.param(*case, job("submissions", model=case[0], dtype=case[1], patched=True), id=" ".join(case),
                 marks=(pytest.mark.slow, *([pytest.mark.gate] if case[:3] == IN_THE_GATE else [])))
    for case in TABLE
]


def counts(report: dict[str, Any], what: str) -> tuple[list[int], list[int]]:
    return [report[what]["model"][kind] for kind in KINDS], [report[what]["block"][kind] for kind in KINDS]


@pytest.mark.parametrize(("model", "dtype", "what", "wanted"), CASES)
def test_a_model_submits_what_the_table_says(
    reports: Reports, model: str, dtype: str, what: str, wanted: Job
) -> None:
    report = reports(wanted)
    found, calls = counts(report, what), report["calls"][what]
    check_products(calls)
    assert not any("addmm" in name.removeprefix("aten::baddbmm") for name, *_ in calls["products"])  # biased F.linear
    assert calls["host"] == []
    assert found == TABLE[model, dtype, what]
    assert sum(found[1]) <= (BLOCK_TOKEN[model] if what == "token" else BLOCK_PROMPT)
    if model == "embedded" and what == "token":
        assert sum(found[0]) <= TOKEN


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [job("submissions", model="embedded", dtype="float32", patched=False)])
def test_an_unpatched_token_submits_what_the_document_says(reports: Reports, wanted: Job) -> None:
    report = reports(wanted)
    whole, _ = counts(report, "token")
    classes = "transformers' own classes" if report["own_classes"] else "those of the package xlstm"
    assert f"{sum(whole)} with {classes}" in " ".join(TEXT.split())


def test_the_document_quotes_the_table() -> None:
    for (model, dtype, what), (whole, block) in TABLE.items():
        cells = [model, dtype, what, *map(str, whole), str(sum(whole)), str(sum(block))]
        assert f"| {' | '.join(cells)} |" in TEXT
