"""An MPS device on Linux: the real Inductor MPS backend, its Metal source compiled by g++ and run by fibers.

    import torch
    from tests.mps import emulator
    if reason := emulator.missing(): ...
    emulator.start()                        # in a process of its own: there is no way back
    with emulator.recording() as log:
        torch.compile(f)(x.to("mps"))
    log.launches, log.aten                  # every kernel launch and every ATen call, in order

It proves numerics, buffers, launches, barriers and which ATen ops are reached. It says nothing about speed, and
nothing about whether Apple's compiler takes the source.
"""

from .device import ORDERS, peak_bytes, recording, sequence, set_dry, set_order, start
from .log import AtenCall, Launch, Log, Operand
from .requirements import missing
from .translate import NotUnderstood

__all__ = [
    "ORDERS", "AtenCall", "Launch", "Log", "NotUnderstood", "Operand", "missing", "peak_bytes", "recording",
    "sequence", "set_dry", "set_order", "start",
]
