"""The mLSTM's step, functional and in place."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import Tensor

from torch_xlstm_ops.kernels.threads import step_threads
from torch_xlstm_ops.maths import mlstm
from torch_xlstm_ops.maths.shapes import EPS, check_mlstm_step, check_not_negative
from torch_xlstm_ops.ops import overlap
from torch_xlstm_ops.ops.call_cache import CallCache
from torch_xlstm_ops.ops.operator import copy_to_state, overload, without_view
from torch_xlstm_ops.runtime import compiler, devices, torch_internals

STATE = slice(5, 8)  # c, n, m among the arguments
Results = tuple[Tensor, Tensor, Tensor, Tensor]


def run(*args: Tensor, eps: float = EPS) -> Results:
    """Return h and the state c, n, m after a token; args: q k v igate fgate c n m."""
    given, call = list(args), _calls.hit(args, mlstm.advance, eps)
    if call is None:  # a call that hits is like one that was contiguous
        given = [t.contiguous() for t in args]
        call = _calls(given, mlstm.advance, eps)
    h, c, n, m = call(given)
    return (h, c, n, m) if c.dim() == 4 else (h, without_view(c.flatten(2, 3)), n, m)


def run_(*args: Tensor, eps: float = EPS) -> Tensor:
    """Write the state after a token over c, n, m, and return h."""
    given, call = list(args), _calls.hit(args, mlstm.step_, eps)
    if call is None and all(t.is_contiguous() for t in args[STATE]):
        given = [t.contiguous() for t in args]
        call = _calls(given, mlstm.step_, eps)
    if call is None or not _overlaps.apart(call, given):
        return run_by_copy(*args, eps=eps)
    with devices.submission(args[0].device):
        (h,) = call(given)
    # A compiled kernel writes behind autograd's back.
    torch_internals.written([t for t in args[STATE] if not t.is_inference()])
    return h


def run_by_copy(*args: Tensor, eps: float = EPS) -> Tensor:
    """Do what `run_` does where the state is not contiguous, or shares memory with q, k, v, or gates.

    Raises ValueError where c, n, m share memory with each other, or a state's elements do among themselves.
    """
    c, n, m = args[STATE]
    overlap.check_writable(c=c, n=n, m=m)
    return copy_to_state("mlstm_step", args, {"eps": eps}, STATE)


def fake(*args: Tensor, eps: float = EPS) -> Results:
    """Check the arguments of a step and allocate its results."""
    check_mlstm_step(*args)
    check_not_negative("eps", eps)
    _, _, v, _, _, c, n, m = args
    return v.new_empty(v.shape), c.new_empty(c.shape), n.new_empty(n.shape), m.new_empty(m.shape)


def fake_(*args: Tensor, eps: float = EPS) -> Tensor:
    """Check the arguments of a step and allocate h."""
    return fake(*args, eps=eps)[0]


def gradients(*tensors: Tensor, eps: float = EPS) -> Sequence[Tensor]:
    """Return a step's gradients: those of a sequence of one token. tensors: dh, dc, dn, dm, and the arguments."""
    dh, dc, dn, dm, q, k, v, *rest = tensors
    args = (dh[:, :, None], dc, dn, dm, q[:, :, None], k[:, :, None], v[:, :, None], *rest)
    dq, dk, dv, *others = overload("mlstm_chunkwise_backward")(*args, eps=eps)
    return dq.squeeze(2), dk.squeeze(2), dv.squeeze(2), *others


def _find(args: list[Tensor], fn: compiler.PureFunction, eps: float) -> compiler.RawCallable:
    check_mlstm_step(*args)
    check_not_negative("eps", eps)
    call = compiler.get(fn, mlstm.AXES[fn], args, threads=step_threads(args[5].numel()), eps=eps)
    return call if args[0].device.type != "mps" else functools.partial(_submit, call)


def _submit(call: compiler.RawCallable, args: list[Tensor]) -> Sequence[Tensor]:
    with devices.submission(args[0].device):
        return call(args)


_calls = CallCache(_find)
_overlaps = overlap.OverlapCheck(written=STATE)
