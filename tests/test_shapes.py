"""Errors for bad input: argument, expectation, finding; the same from the operators and their fakes."""

from __future__ import annotations

import expecttest
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.oracle import Sizes, draw
from torch_xlstm_ops import mlstm_chunkwise, mlstm_step, mlstm_step_

SEQUENCE = ["q", "k", "v", "igate", "fgate", "c", "n", "m"]


def sequence(**replaced):
    args = dict(zip(SEQUENCE, draw(Sizes(2, 4, 128, 8, 16)), strict=True))
    return {**args, **{name: change(args[name]) for name, change in replaced.items()}}


def step(**replaced):
    args = sequence()
    args |= {name: args[name][:, :, 0] for name in ("q", "k", "v")}
    args |= {name: args[name][:, :, :1] for name in ("igate", "fgate")}
    return {**args, **{name: change(args[name]) for name, change in replaced.items()}}


def told(call, args, **kwargs):
    """Return what the operator says, after checking that its fake says the same and that nothing was written."""
    before = {name: t.clone() for name, t in args.items() if t is not None}
    texts = []
    for fake in (False, True):
        with FakeTensorMode() as mode:
            inputs = {name: mode.from_tensor(t) if fake and t is not None else t for name, t in args.items()}
        try:
            call(**inputs, **kwargs)
        except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
            texts.append(f"{type(error).__name__}: {error}")
    assert len(texts) == 2, f"only {texts}"
    assert texts[0] == texts[1]
    assert all(torch.equal(t, before[name]) for name, t in args.items() if t is not None)
    return texts[0]


class TestErrors(expecttest.TestCase):
    def test_sequence(self):
        cases = [
            sequence(q=lambda t: t[0]),
            sequence(k=lambda t: t[:, :3]),
            sequence(v=lambda t: t[:, :, :5]),
            sequence(igate=lambda t: t[..., 0]),
            sequence(fgate=lambda t: t[..., None]),
            sequence(v=lambda t: t[0]),
            sequence(k=lambda t: t.half()),
            sequence(q=lambda t: t.int(), k=lambda t: t.int(), v=lambda t: t.int()),
            sequence(igate=lambda t: t.int()),
            sequence(c=lambda t: t.bfloat16()),
            sequence(n=lambda t: None),
            sequence(c=lambda t: t.mT),
            sequence(m=lambda t: t[..., 0]),
        ]
        self.assertExpectedInline("\n".join(told(mlstm_chunkwise, case) for case in cases), """\
ValueError: q must be (B, NH, S, DHQK), got (4, 128, 8)
ValueError: k must be (B, NH, S, DHQK) = (2, 4, 128, 8), got (2, 3, 128, 8)
ValueError: v must be (B, NH, S, DHHV) = (2, 4, 128, 16), got (2, 4, 5, 16)
ValueError: igate must be (B, NH, S) = (2, 4, 128), got (2, 4)
ValueError: fgate must be (B, NH, S) = (2, 4, 128), got (2, 4, 128, 1)
ValueError: v must be (B, NH, S, DHHV), got (4, 128, 16)
TypeError: k must have q's dtype float32, got float16
TypeError: q must be float32, float16, bfloat16 or float64, got int32
TypeError: igate must have a floating dtype, got int32
TypeError: c must be float32 beside float32 inputs, got bfloat16
ValueError: c, n, m must be given together or not at all, got c, m without n
ValueError: c must be (B, NH, DHQK, DHHV) = (2, 4, 8, 16), got (2, 4, 16, 8)
ValueError: m must be (B, NH, 1) = (2, 4, 1), got (2, 4)""")

    def test_options(self):
        options = [
            {"chunk_size": 0}, {"chunk_size": -16}, {"schedule": "fastest"}, {"eps": -1.0}, {"eps": float("nan")},
        ]
        self.assertExpectedInline("\n".join(told(mlstm_chunkwise, sequence(), **o) for o in options), """\
ValueError: chunk_size must be a whole number of at least 1, got 0
ValueError: chunk_size must be a whole number of at least 1, got -16
ValueError: schedule must be one of auto, inductor, queued, ray, recurrent, got 'fastest'
ValueError: eps must be at least 0, got -1.0
ValueError: eps must be at least 0, got nan""")

    def test_step(self):
        cases = [step(q=lambda t: t[:, :, None]), step(fgate=lambda t: t[..., 0]), step(n=lambda t: t[:1])]
        self.assertExpectedInline("\n".join(told(mlstm_step, case) for case in cases), """\
ValueError: q must be (B, NH, DHQK), got (2, 4, 1, 8)
ValueError: fgate must be (B, NH, 1) = (2, 4, 1), got (2, 4)
ValueError: n must be (B, NH, DHQK) = (2, 4, 8), got (1, 4, 8)""")

    def test_step_in_place(self):
        cases = [step(m=lambda t: t.double()), step(v=lambda t: t[:, :3])]
        self.assertExpectedInline("\n".join(told(mlstm_step_, case) for case in cases), """\
TypeError: m must be float32 beside float32 inputs, got float64
ValueError: v must be (B, NH, DHHV) = (2, 4, 16), got (2, 3, 16)""")


def test_mixed_devices():
    with pytest.raises(ValueError, match="k must be on q's device cpu, got meta"):
        mlstm_chunkwise(**sequence(k=lambda t: t.to("meta")))
