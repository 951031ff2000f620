"""What reached the emulated device: launches of generated kernels and ATen calls, in one order."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# Ops whose result the host has to wait for, beside a copy to it.
SYNCHRONISING = frozenset({
    "_local_scalar_dense", "equal", "is_nonzero", "masked_select", "nonzero", "_unique2", "unique_dim",
    "unique_consecutive",
})


@dataclass(frozen=True)
class Operand:
    """A tensor or scalar that a submission reads or writes; `nbytes` counts an expanded dimension once.

    offset: the place of its first element in its storage.
    """

    sizes: tuple[int, ...]
    dtype: str
    nbytes: int
    written: bool
    device: str = "mps"
    name: str = ""
    offset: int = 0
    contiguous: bool = True


@dataclass(frozen=True)
class Launch:
    """One launch of a generated Metal kernel."""

    sequence: int
    kernel: str
    source: str
    threads: tuple[int, ...]
    group: tuple[int, ...] | None
    buffers: tuple[Operand, ...]
    statistics: dict[str, int]
    thread: int
    overlapped: bool


@dataclass(frozen=True)
class AtenCall:
    """One ATen op that reached the MPS key; a view moves nothing."""

    sequence: int
    name: str
    tensors: tuple[Operand, ...]
    is_view: bool
    thread: int
    overlapped: bool

    @property
    def op(self) -> str:
        """The op's name without namespace and overload."""
        return self.name.removeprefix("aten::").split(".")[0]

    @property
    def reads_host(self) -> bool:
        """Whether the call copies from the host to the device."""
        return self.op == "copy_" and self._written_on("mps") and any(t.device != "mps" for t in self.tensors)

    @property
    def waits_for_device(self) -> bool:
        """Whether the host needs the result: a round trip."""
        return self.op in SYNCHRONISING or (self.op == "copy_" and self._written_on("cpu"))

    def _written_on(self, device: str) -> bool:
        return any(t.written and t.device == device for t in self.tensors)


@dataclass
class Log:
    """Submissions in the order in which they started."""

    launches: list[Launch] = field(default_factory=list)
    calls: list[AtenCall] = field(default_factory=list)

    @property
    def aten(self) -> list[AtenCall]:
        """The ATen calls that do something, views left out."""
        return [call for call in self.calls if not call.is_view]

    @property
    def submissions(self) -> list[Launch | AtenCall]:
        """Everything that was submitted, in order."""
        return sorted([*self.launches, *self.aten], key=lambda entry: entry.sequence)


def aten_call(entry: dict[str, Any]) -> AtenCall:
    """Return the call that one line of the extension's log describes."""
    operands = tuple(Operand(**{**t, "sizes": tuple(t["sizes"])}) for t in entry["tensors"])
    return AtenCall(
        sequence=entry["sequence"], name=entry["name"], tensors=operands, is_view=entry["is_view"],
        thread=entry["thread"], overlapped=entry["overlapped"],
    )
