"""Every operator's schema, and the one library that owns them."""

from __future__ import annotations

import torch

LIBRARY = torch.library.Library("xlstm", "DEF")  # type: ignore[no-untyped-call]

_STREAMS = "Tensor q, Tensor k, Tensor v, Tensor igate, Tensor fgate"
_STATE = "Tensor c, Tensor n, Tensor m"
_MAYBE_STATE = "Tensor? c=None, Tensor? n=None, Tensor? m=None"
_RESET = "Tensor? reset=None"
_HOW = "int? chunk_size=None, str? schedule=None, float eps=1e-06"

_CELL = "Tensor x, Tensor r, Tensor b"
_CELL_STATE = "Tensor y, Tensor c, Tensor n, Tensor m"

SCHEMAS = {
    "mlstm_step": f"({_STREAMS}, {_STATE}, *, float eps=1e-06) -> (Tensor, Tensor, Tensor, Tensor)",
    "mlstm_step_": f"({_STREAMS}, Tensor(a!) c, Tensor(b!) n, Tensor(c!) m, *, float eps=1e-06) -> Tensor",
    "mlstm_chunkwise": f"({_STREAMS}, {_MAYBE_STATE}, {_RESET}, *, {_HOW}) -> (Tensor, Tensor, Tensor, Tensor)",
    "mlstm_chunkwise_backward": (
        f"(Tensor dh, Tensor dc, Tensor dn, Tensor dm, {_STREAMS}, {_MAYBE_STATE}, {_RESET}, *,"
        f" {_HOW}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "slstm_step": f"({_CELL}, {_CELL_STATE}, *, float floor=0.0) -> (Tensor, Tensor, Tensor, Tensor)",
    "slstm_sequence": (
        f"({_CELL}, Tensor? y=None, {_MAYBE_STATE}, {_RESET}, *, float floor=0.0, str? schedule=None)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "slstm_sequence_backward": (
        f"(Tensor dh, Tensor dy, Tensor dc, Tensor dn, Tensor dm, {_CELL}, Tensor? y, Tensor? c, Tensor? n, Tensor? m,"
        f" Tensor h, {_RESET}, *, float floor=0.0, str? schedule=None)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
}

for _name, _schema in SCHEMAS.items():
    LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
