"""The results of `xlstm-ops check` on one page: what is wrong and in which package, and how fast the model is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch_xlstm_ops.cli.checking.cases import OURS, TORCH
from torch_xlstm_ops.cli.checking.run import NOT_RUN, Result


def counts(results: Sequence[Result]) -> str:
    """Return how many passed, failed and, if time ran out, were not run."""
    idle = sum(result.failure.startswith("not run") for result in results)
    late = sum(result.failure == NOT_RUN for result in results)
    passed = sum(not result.failure for result in results)
    counted = f"{passed} passed, {len(results) - passed - idle} failed"
    if late:
        return f"{counted}, {idle} not run as the time was up: give a larger --seconds"
    return f"{counted}, {idle} not run" if idle else counted


def page(results: Sequence[Result], machine: dict[str, Any], launch_us: dict[str, float]) -> str:
    """Return the lines after the table."""
    lines = [f"{machine['chip']}, {machine['gpu_cores'] or 'unknown'} GPU cores, {machine['cpu_cores']} CPU cores, "
             f"{machine['platform']}"]
    if machine["virtual_machine"]:
        lines.append("this is a virtual machine: times mean nothing, and MPSGraph may be wrong")
    lines += [f"set in the environment: {name}={value}" for name, value in machine["environment"].items()]
    lines.append("a launch takes " + ", ".join(f"{us:.1f} us ({name})" for name, us in launch_us.items()))
    lines += [f"{r.operator}, {r.dtype}: {r.tokens_per_s:.0f} tokens/s" for r in results if r.tokens_per_s is not None]
    firsts = [r.first_call_s for r in results if r.first_call_s is not None and r.party == OURS]
    if firsts:
        lines.append(f"first calls, which compile: {sum(firsts):.0f} s in all, {max(firsts):.0f} s the longest")
    wrong = [r for r in results if r.failure and not r.failure.startswith("not run")]
    for party, advice in ((TORCH, "an error of torch or of the system: update them"),
                          (OURS, "please report it with the JSON file")):
        names = ", ".join(f"{r.operator} ({r.dtype})" for r in wrong if r.party == party)
        if names:
            lines.append(f"WRONG in {party}: {names}; {advice}")
    if {r.party for r in wrong} == {TORCH, OURS}:
        lines.append("ours may be wrong because torch is: compare after an update of torch or macOS")
    return "\n".join(lines)
