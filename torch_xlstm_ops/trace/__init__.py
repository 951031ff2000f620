"""Timings per operator, layer, band, segment and phase, on the clock of the device that runs the work.

Without a recording, tracing costs one branch. Code that runs work contains

    if trace.active():
        with trace.span("mlstm_chunkwise", schedule="inductor", band=b, segment=s, device=h.device):
            work()
    else:
        work()

(`span` alone is also correct, but slower). A span on CUDA or MPS is two events around the work submitted inside it,
read without waiting once the device has passed them. On the CPU it is the host's clock.

`record` records inside a ``with`` block; ``XLSTM_OPS_TRACE`` (or any other source of the `trace` setting) records the
whole process and writes the file, if there is a span, when it exits. A recording keeps its newest `capacity` spans.
"""

from torch_xlstm_ops.trace.export import Span
from torch_xlstm_ops.trace.process import finish
from torch_xlstm_ops.trace.recording import Recording
from torch_xlstm_ops.trace.spans import Open, active, add, current_layer, paused, record, set_layer, span

__all__ = [
    "Open", "Recording", "Span", "active", "add", "current_layer", "finish", "paused", "record", "set_layer", "span",
]
