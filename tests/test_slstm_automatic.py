"""Laws of the sLSTM's schedule `auto`: when it is parallel in time, and when it is sequential again."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from torch_xlstm_ops import slstm_sequence, trace
from torch_xlstm_ops.ops.slstm import automatic, sequence
from torch_xlstm_ops.ops.slstm.automatic import Automatic
from torch_xlstm_ops.runtime import compiler
from torch_xlstm_ops.schedules.slstm.rounds import Report


class OnCuda(torch.Tensor):
    """A CPU tensor that says it is elsewhere."""

    device = property(lambda self: torch.device("cuda", 0))


def tokens(S: int = automatic.SHORTEST, dtype: torch.dtype = torch.float32, DH: int = 8) -> torch.Tensor:
    return torch.zeros(1, S, 4, 1, DH, dtype=dtype).as_subclass(OnCuda)


class Calls:
    """Calls of one kind: how each ran, and what the next parallel one does."""

    def __init__(self) -> None:
        self.chooser, self.ready, self.fell_back = Automatic(), True, 0
        self.tried = 0

    def parallel(self) -> str:
        self.tried += 1
        if not self.ready:
            raise compiler.NotReady
        return "parallel"

    def run(self, x: torch.Tensor | None = None, what: str = "forward") -> str:
        x = tokens() if x is None else x
        report = Report(4, 0.0, 0.0, 1, self.fell_back)
        return self.chooser.run(what, x, False, 0.0, self.parallel, lambda: report) or "sequential"


def test_long_calls_on_cuda_are_parallel() -> None:
    calls = Calls()
    assert calls.run() == "parallel"
    for x in (tokens(automatic.SHORTEST - 1), tokens(dtype=torch.float64), torch.zeros(1, 4096, 4, 1, 8)):
        assert calls.run(x) == "sequential"
    assert calls.tried == 1


def test_nothing_is_tried_again_until_another_function_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls()
    calls.ready = False
    assert [calls.run() for _ in range(3)] == ["sequential"] * 3
    assert calls.tried == 1
    assert calls.run(tokens(DH=16)) == "sequential"  # another kind
    assert calls.tried == 2
    monkeypatch.setattr(compiler, "_obtained", compiler._obtained + 1)
    calls.ready = True
    assert calls.run() == "parallel"


def test_calls_pause_longer_each_time_windows_do_not_converge() -> None:
    calls = Calls()
    calls.fell_back = 1
    ran = [calls.run() for _ in range(12)]
    assert [i for i, how in enumerate(ran) if how == "parallel"] == [0, 2, 5, 10]
    assert calls.run(what="backward") == "parallel"  # of another kind
    calls.fell_back = 0
    ran = [calls.run() for _ in range(12)]
    assert ran.index("parallel") == 7  # the last pause has these calls left
    assert set(ran[7:]) == {"parallel"}


def test_functions_that_are_not_ready_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler.clear()
    before = compiler.obtained()
    x, r, b = torch.randn(1, 16, 4, 1, 8), torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8)
    with pytest.raises(compiler.NotReady):
        sequence.parallel.forward(x, r, b, [], None, 0.0, only_ready=True)
    assert compiler.obtained() == before


@pytest.mark.slow
def test_auto_is_parallel_once_its_functions_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Automatic.run

    def run_anywhere(self: Automatic, what: str, x: torch.Tensor, *rest: Any) -> Any:
        return original(self, what, x.as_subclass(OnCuda), *rest)

    monkeypatch.setattr(Automatic, "run", run_anywhere)
    x, r, b = torch.randn(1, automatic.SHORTEST, 4, 1, 8), torch.randn(4, 1, 8, 8) * 0.1, torch.randn(4, 1, 8)

    def schedules() -> list[str | None]:
        with trace.record() as recording:
            h, _ = slstm_sequence(x.requires_grad_(), r, b)
            h.sum().backward()
        return [span.schedule for span in recording.entries() if span.op == sequence.OP]

    assert schedules() == ["sequential"] * 2
    h, _ = slstm_sequence(x, r, b, schedule="parallel")
    h.sum().backward()
    assert schedules() == ["parallel"] * 2
