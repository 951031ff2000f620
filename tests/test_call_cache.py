"""Laws of what is remembered of calls: found once for each kind, whatever came between."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.oracle import Sizes, draw
from torch_xlstm_ops.ops.call_cache import CallCache

one, two = torch.zeros(2, 3), torch.zeros(3, 2)
KINDS = {
    "tensors": ((one, one), "a"),
    "how": ((one, one), "b"),
    "shape": ((one, two), "a"),
    "dtype": ((one, one.double()), "a"),
    "count": ((one,), "a"),
    "absent": ((one, None), "a"),
}


def test_a_kind_of_call_is_found_once():
    found: list[tuple[Sequence[Tensor | None], str]] = []

    def find(tensors: Sequence[Tensor | None], how: str) -> int:
        found.append((tensors, how))
        return len(found)

    seen = CallCache(find)
    first = {name: seen(*kind) for name, kind in KINDS.items()}
    assert sorted(first.values()) == [1, 2, 3, 4, 5, 6]
    for name, (tensors, how) in reversed(KINDS.items()):
        for _ in range(2):
            assert seen(tensors, how) == first[name]
    assert seen((one, one.t().contiguous().t()), "a") == first["tensors"]  # other strides, the same kind
    seen.clear()
    assert seen(*KINDS["how"]) == 7


def test_the_latest_kind_is_known_again_by_its_strides_too():
    seen = CallCache(lambda tensors, how: how)
    assert seen.hit((one, two), "a") is None
    assert seen((one, two), "a") == "a"
    assert seen.hit((two.t().contiguous(), two), "a") == "a"
    assert seen.hit((two.t(), two), "a") is None
    assert seen.hit((one, two), "b") is None
    assert seen((one, None, two), "a") == "a"
    assert seen.hit((one, None, two), "a") == "a"
    assert seen.hit((one, two, None), "a") is None
    assert seen.hit((one, one, two), "a") is None
    assert seen.hit((one, None, None), "a") is None
    assert seen.hit((one.t().contiguous().t(), None, two), "a") is None


def test_a_number_of_threads_is_a_kind():
    seen = CallCache(lambda tensors: torch.get_num_threads())
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            assert seen((one,)) == threads
    finally:
        torch.set_num_threads(before)


def test_what_find_raises_is_not_remembered():
    def find(tensors: Sequence[Tensor | None]) -> int:
        raise ValueError("no")

    seen = CallCache(find)
    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            seen((one,))


def test_a_mode_sees_the_operator():
    """Below autograd a call goes straight to its device, unless somebody listens between."""
    names: list[str] = []

    class Listener(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    q, k, v, igate, fgate, c, n, m = draw(Sizes(S=1))
    step = (q[:, :, 0], k[:, :, 0], v[:, :, 0], igate, fgate, c, n, m)
    expected = torch.ops.xlstm.mlstm_step(*step)
    with Listener():
        found = torch.ops.xlstm.mlstm_step(*step)
    assert names[0] == "xlstm.mlstm_step.default"
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
