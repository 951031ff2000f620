"""The submissions of a transformers model on MPS, by kind: the table that docs/mps.md quotes."""

from __future__ import annotations

from typing import Any

import pytest

from .jobs import Job, Reports, job
from .submissions import KINDS

pytest.importorskip("transformers")

TOKEN, BLOCK_TOKEN = 60, {"embedded": 9, "7B": 12}  # most submissions of a token
TABLE = {  # kernels, products, copies, fills, other: of a token in the whole model, and in one block
    ("embedded", "float32"): ([56, 1, 0, 0, 2], [9, 0, 0, 0, 0]),
    ("embedded", "bfloat16"): ([56, 1, 1, 0, 2], [9, 0, 0, 0, 0]),
    ("7B", "bfloat16"): ([20, 1, 1, 0, 2], [9, 0, 0, 0, 0]),
}
CASES = [
    pytest.param(*case, job("submissions", model=case[0], dtype=case[1], patched=True), id=" ".join(case),
                 marks=() if case == ("embedded", "float32") else pytest.mark.slow)
    for case in TABLE
]


def counts(report: dict[str, Any], what: str) -> tuple[list[int], list[int]]:
    return [report[what]["model"][kind] for kind in KINDS], [report[what]["block"][kind] for kind in KINDS]


@pytest.mark.parametrize(("model", "dtype", "wanted"), CASES)
def test_a_token_submits_what_the_table_says(reports: Reports, model: str, dtype: str, wanted: Job) -> None:
    found = counts(reports(wanted), "token")
    assert found == TABLE[model, dtype]
    assert sum(found[1]) <= BLOCK_TOKEN[model]
    if model == "embedded":
        assert sum(found[0]) <= TOKEN
