"""What decides a kernel: its function, its arguments, our source, torch, the processor and the options."""

from __future__ import annotations

import enum
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_xlstm_ops.runtime import torch_internals
from torch_xlstm_ops.runtime.devices import processor
from torch_xlstm_ops.runtime.state import on_reset

FORMAT = 1
_ROOT = Path(__file__).parent.parent.parent
_SOURCES = ("maths", "runtime", "patch")  # where compiled functions, and what compiles them, are written
_OWN = f"{__name__.partition('.')[0]}.maths."
# Lines of /proc/cpuinfo that name the processor and its instructions, on x86 and on ARM.
_PROCESSOR = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags", "Features", "CPU implementer",
              "CPU architecture", "CPU variant", "CPU part")
_VARIABLES = ("TORCHINDUCTOR_", "TORCH_COMPILE", "ATEN_CPU_CAPABILITY")
_IRRELEVANT = ("TORCHINDUCTOR_CACHE_DIR",)
_GPU = re.compile(r"cuda:([0-9]{1,3})")
_TRITON = ("DISABLE_LLVM_OPT", "DISABLE_PTXAS_OPT", "PTXAS_OPTIONS")
_DISTRIBUTIONS = ("triton", "pytorch-triton")  # that have Triton


class Request(NamedTuple):
    """What a kernel must be: properties by name. Two kernels with the same properties are the same."""

    properties: Mapping[str, str]

    @property
    def key(self) -> str:
        """Return a name for these properties."""
        return hashlib.sha256(json.dumps(self.properties, sort_keys=True).encode()).hexdigest()[:40]


def unsupported(device: torch.device) -> str | None:
    """Return why kernels for a device are not kept, or None if they are."""
    if device.type not in ("cpu", "cuda"):
        return f"kernels for {device.type} are kept by Inductor alone"
    if device.type == "cuda" and torch.version.hip is not None:
        return "kernels for GPUs are kept on NVIDIA's alone"
    if not sys.platform.startswith("linux"):
        return f"kernels are kept on Linux alone, not on {sys.platform}"
    return None


def request(
    fn: Callable[..., Any], axes: Sequence[Sequence[str]], args: Sequence[Tensor], free: Mapping[str, int],
    options: Mapping[str, Any], inlined: Mapping[Any, Callable[..., Any]],
) -> Request | None:
    """Return the properties of a compiled function, or None if it cannot be kept.

    axes, args, free, options and inlined are those that it is compiled with.
    """
    function, around = _name(fn), [(str(op), _name(rule)) for op, rule in inlined.items()]
    changes = torch_internals.inductor_changes()
    if function is None or changes is None or unsupported(args[0].device) or not _software():
        return None
    found = {
        **here(args[0].device), "function": function, "inlined": repr(around),
        "arguments": "; ".join(_argument(names, t, free) for names, t in zip(axes, args, strict=True)),
        "free": repr(sorted(free.items())), "options": repr(sorted(options.items())),
        "settings": repr((_settings(args[0].device), changes)),
    }
    return Request(found)


def _argument(names: Sequence[str], t: Tensor, free: Mapping[str, int]) -> str:
    sizes = [name if name in free else str(size) for name, size in zip(names, t.shape, strict=True)]
    return f"{str(t.dtype).removeprefix('torch.')}[{' '.join(sizes)}]"


def _name(fn: Callable[..., Any]) -> str | None:
    """Return a name that stands for a function in every process with our source; None if there is none."""
    if isinstance(fn, functools.partial):
        inner, values = _name(fn.func), {name: _value(value) for name, value in fn.keywords.items()}
        if inner is None or fn.args or None in values.values():
            return None
        return inner + "".join(f" {name}={value}" for name, value in sorted(values.items()))
    kept_as = getattr(fn, "kept_as", None)  # of objects whose source is not ours alone
    if kept_as is not None:
        name: str | None = kept_as()
        return name
    place = f"{getattr(fn, '__module__', '')}:{getattr(fn, '__qualname__', '<')}"
    return place if place.startswith(_OWN) and "<" not in place else None


def _value(value: object) -> str | None:
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    return repr(value) if value is None or type(value) in (bool, int, float, str, torch.dtype) else None


def _settings(device: torch.device) -> list[tuple[str, str]]:
    """Return what else of the process Inductor, torch and Triton read when they compile."""
    variables = [(name, value) for name, value in sorted(os.environ.items())
                 if (name.startswith(_VARIABLES) and name not in _IRRELEVANT)
                 or (device.type == "cuda" and _is_of_triton(name, value))]
    return [
        *variables, ("matmul precision", torch.get_float32_matmul_precision()),
        ("deterministic", str(torch.are_deterministic_algorithms_enabled())),
        ("mkldnn", str(torch.backends.mkldnn.enabled)), ("default dtype", str(torch.get_default_dtype())),
    ]


def _is_of_triton(name: str, value: str) -> bool:
    """Return whether a variable decides code of Triton; Inductor itself sets some, to folders and programs of torch."""
    if name.startswith("TRITON_PTXAS"):
        return not value.startswith(str(Path(torch.__file__).parent))
    return name in _TRITON or (name.startswith("TRITON_") and not name.endswith(("_DIR", "_HOME", "_PATH")))


@on_reset
def forget() -> None:
    """Read the source and the machine again at the next request."""
    _software.cache_clear()
    _machine.cache_clear()
    _gpu.cache_clear()


@functools.cache
def _software() -> Mapping[str, str]:
    """Return the versions; nothing if our source is not in files."""
    hashed, files = hashlib.sha256(), sorted(path for part in _SOURCES for path in (_ROOT / part).rglob("*.py"))
    for path in files:
        hashed.update(f"{path.relative_to(_ROOT)}\0".encode())
        hashed.update(path.read_bytes())
    if not files:
        return {}
    return {
        "format": str(FORMAT), "source": hashed.hexdigest()[:16],
        "torch": f"{torch.__version__} {torch.version.git_version or ''}".strip(),
        "python": str(sysconfig.get_config_var("SOABI") or sys.implementation.cache_tag),
    }


@functools.cache
def _machine() -> Mapping[str, str]:
    lines = {name: value for name, value in processor.facts().items() if name in _PROCESSOR}
    instructions = hashlib.sha256(" ".join(sorted(lines.pop("flags", lines.pop("Features", "")).split())).encode())
    model = " ".join(lines.values()) or platform.processor()
    return {
        "system": f"{sys.platform} {platform.machine()}",
        "processor": f"{model} (instructions {instructions.hexdigest()[:12]})",
        "vectors": torch.backends.cpu.get_cpu_capability(),
    }


@functools.cache
def _gpu(index: int) -> Mapping[str, str]:
    """Return what decides machine code for a GPU; no GPU has the properties of one that is not there."""
    properties = {
        "system": f"{sys.platform} {platform.machine()}", "cuda": str(torch.version.cuda), "triton": _triton(),
        "device": f"cuda:{index}", "gpu": "none",
    }
    if index < torch.cuda.device_count():
        about = torch.cuda.get_device_properties(index)
        properties["gpu"] = (f"{about.name}, capability {about.major}.{about.minor}, "
                             f"{about.multi_processor_count} multiprocessors")
    return properties


def _triton() -> str:
    for name in _DISTRIBUTIONS:
        with suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return "none"


def here(device: torch.device | None = None) -> Mapping[str, str]:
    """Return the properties of this installation, and of this machine as far as they decide code for a device.

    device: default the CPU.
    """
    if device is not None and device.type == "cuda":
        return {**_software(), **_gpu(device.index or 0)}
    return {**_software(), **_machine()}


def device_of(properties: Mapping[str, str]) -> torch.device:
    """Return the device that a kernel was compiled for."""
    match = _GPU.fullmatch(str(properties.get("device")))
    return torch.device("cpu") if match is None else torch.device("cuda", int(match[1]))


def compiler() -> str | None:
    """Return what tells this machine's C++ compiler from another version of it, or None if there is none.

    Runs nothing: path, size and time of the program that Inductor looks for first.
    """
    path = shutil.which(os.environ.get("CXX") or "g++")
    if path is None:
        return None
    real = os.path.realpath(path)
    about = os.stat(real)
    return f"{real} {about.st_size} {about.st_mtime_ns}"
