"""Whether this torch implements an ATen op for MPS, from the native_functions.yaml that its wheel carries."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torchgen
import yaml

# Kernels under these keys serve MPS too.
SERVES_MPS = {
    "MPS", "CompositeImplicitAutograd", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional",
}


@functools.cache
def _functions() -> dict[str, dict[str, Any]]:
    path = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return {entry["func"].split("(")[0]: entry for entry in yaml.load(path.read_text(), loader)}


def implemented_for_mps(name: str) -> bool:
    """Return whether ``aten::name.overload`` has a kernel that runs on MPS; False for a name torch does not have."""
    entry = _functions().get(name.removeprefix("aten::"))
    if entry is None:
        return False
    if delegate := entry.get("structured_delegate"):
        return implemented_for_mps(delegate)
    dispatch = entry.get("dispatch") or {"CompositeImplicitAutograd": ""}
    keys = {key.strip() for group in dispatch for key in group.split(",")}
    return bool(keys & SERVES_MPS)
