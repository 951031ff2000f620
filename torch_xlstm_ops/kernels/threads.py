"""How many threads a kernel is compiled for."""

from __future__ import annotations

# Elements of a state up to which one CPU thread is as fast as many: waking the others takes longer than it saves, and
# beside other work they come late.
ONE_THREAD = 1 << 16


def step_threads(elements: int) -> int | None:
    """Return for how many threads to compile the step of a state; None: for all that the caller may use."""
    return 1 if elements <= ONE_THREAD else None
