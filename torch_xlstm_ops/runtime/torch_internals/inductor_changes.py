"""What a process changed in Inductor's options."""

from __future__ import annotations

import sys
from contextvars import ContextVar

from torch_xlstm_ops.runtime.torch_internals.need import need


def _unknown_changes() -> str | None:
    return None if "torch._inductor.config" in sys.modules else ""


@need(_unknown_changes, where=("torch._inductor.config._config",),
      without="a process that has imported Inductor neither uses nor keeps kernels of other processes")
def inductor_changes() -> str | None:
    """Return the options of Inductor that the process changed, as text; None if they have no text, such as a function.

    Does not import Inductor.
    """
    if "torch._inductor.config" not in sys.modules:
        return ""
    from torch._inductor import config

    found = []
    for name, entry in config._config.items():  # type: ignore[attr-defined]
        given = entry.user_override.get() if isinstance(entry.user_override, ContextVar) else entry.user_override
        if type(given) is not object and given != entry.default:  # an object() stands for "not given"
            found.append((name, given))
    text = repr(sorted(found, key=str)) if found else ""
    return None if " at 0x" in text else text
