"""Metal source to C++: what Inductor's MPS backend emits, and nothing else."""

from __future__ import annotations

import re
from dataclasses import dataclass

POSITIONS = {
    "thread_position_in_grid": "grid_position",
    "thread_position_in_threadgroup": "group_position",
}
COMPONENTS = {"uint": 1, "uint2": 2, "uint3": 3}

KERNEL = re.compile(
    r"(?:\[\[\s*max_total_threads_per_threadgroup\((?P<max_threads>\d+)\)\s*\]\]\s*)?"
    r"kernel\s+void\s+(?P<name>\w+)\s*\((?P<parameters>[^{]*?)\)\s*\{",
    re.DOTALL,
)
PARAMETER = re.compile(
    r"(?P<space>device|constant)?\s*(?P<type>[\w:]+)\s*(?P<indirection>[*&])?\s*(?P<name>\w+)"
    r"(?:\s*\[\[\s*(?P<attribute>\w+)(?:\(\d+\))?\s*\]\])?"
)
THREADGROUP_VARIABLE = re.compile(r"\bthreadgroup\s+(?P<type>[\w:]+)\s+(?P<name>\w+)\s*(?P<extent>\[[^\]]*\])?\s*;")
MEETS = re.compile(r"\bthreadgroup|\bsimd_|\bsimdgroup_")
KEYWORDS = ("device", "constant", "threadgroup", "thread", "kernel")
# Metal has these two under c10::metal only; the C library's global ones would make the calls ambiguous.
RENAMED = ("expm1f", "log1pf")


class NotUnderstood(SyntaxError):
    """A Metal kernel that the emulator cannot run."""


@dataclass(frozen=True)
class Parameter:
    """One kernel parameter; `attribute` names a thread position, every other parameter is a buffer."""

    name: str
    space: str
    type: str
    indirection: str
    attribute: str | None

    @property
    def is_buffer(self) -> bool:
        """Whether the parameter occupies one of Metal's 31 buffer slots."""
        return self.attribute not in POSITIONS

    @property
    def is_written(self) -> bool:
        """Whether the kernel may store through the parameter."""
        return self.space == "device"


@dataclass(frozen=True)
class KernelSource:
    """One kernel of a Metal library; `text` is its definition without the attribute before it."""

    name: str
    parameters: tuple[Parameter, ...]
    body: str
    max_threads: int | None
    start: int
    end: int

    @property
    def buffers(self) -> tuple[Parameter, ...]:
        """The parameters that occupy buffer slots, in order."""
        return tuple(p for p in self.parameters if p.is_buffer)

    @property
    def is_cooperative(self) -> bool:
        """Whether the kernel's threads meet, at a barrier or in a SIMD group."""
        return MEETS.search(self.body) is not None


def kernels_of(source: str) -> list[KernelSource]:
    """Return the kernels that Metal `source` defines; raise NotUnderstood for any that cannot be run."""
    kernels = [_kernel(source, match) for match in KERNEL.finditer(source)]
    if len(kernels) != len(re.findall(r"\bkernel\s+void\b", source)) or not kernels:
        raise NotUnderstood("not every kernel of the source could be found")
    return kernels


def to_cpp(source: str, kernels: list[KernelSource]) -> str:
    """Return C++ that defines, for every kernel, a C function ``launch_<name>``."""
    text = source
    for kernel in reversed(kernels):
        text = text[: kernel.start] + _definition(kernel) + text[kernel.end :]
    return "\n".join([
        '#include "prelude.h"',
        *(f"#define {word}" for word in KEYWORDS),
        *(f"#define {word} metal_{word}" for word in RENAMED),
        text,
        *(f"#undef {word}" for word in (*KEYWORDS, *RENAMED)),
        *(_launcher(kernel) for kernel in kernels),
    ])


def _kernel(source: str, match: re.Match[str]) -> KernelSource:
    name = match["name"]
    end = _closing_brace(source, match.end())
    if end < 0:
        raise NotUnderstood(f"kernel {name} does not end")
    return KernelSource(
        name=name,
        parameters=tuple(_parameter(name, text) for text in _split(match["parameters"])),
        body=source[match.end() : end],
        max_threads=int(match["max_threads"]) if match["max_threads"] else None,
        start=match.start(),
        end=end + 1,
    )


def _closing_brace(source: str, start: int) -> int:
    depth = 1
    for brace in re.finditer(r"[{}]", source[start:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return start + brace.start()
    return -1


def _split(parameters: str) -> list[str]:
    parts = re.split(r",(?![^(\[<]*[)\]>])", parameters)
    return [" ".join(part.split()) for part in parts if part.strip()]


def _parameter(kernel: str, text: str) -> Parameter:
    match = PARAMETER.fullmatch(text)
    if match is None:
        raise NotUnderstood(f"kernel {kernel}: cannot read parameter '{text}'")
    space, indirection, attribute = match["space"], match["indirection"], match["attribute"]
    is_position = attribute in POSITIONS and match["type"] in COMPONENTS and not indirection
    is_buffer = attribute in (None, "buffer") and space in ("device", "constant") and indirection in ("*", "&")
    if not (is_position or is_buffer):
        raise NotUnderstood(f"kernel {kernel}: cannot emulate parameter '{text}'")
    return Parameter(match["name"], space or "", match["type"], indirection or "", attribute)


def _definition(kernel: KernelSource) -> str:
    def on_host(match: re.Match[str]) -> str:
        name = match["name"]
        declaration = f"static thread_local {match['type']} {name}{match['extent'] or ''}"
        return f"{declaration}; fibers::poison((void*)&{name}, sizeof({name}));"

    body = THREADGROUP_VARIABLE.sub(on_host, kernel.body)
    if rest := re.search(r"\bthreadgroup\s[^\n]*", body):
        raise NotUnderstood(f"kernel {kernel.name}: cannot emulate '{rest[0].strip()}'")
    if rest := re.search(r"\[\[[^\n]*", body):
        raise NotUnderstood(f"kernel {kernel.name}: cannot emulate '{rest[0].strip()}'")
    parameters = ", ".join(_host_parameter(kernel, p) for p in kernel.parameters)
    return f"static void {kernel.name}({parameters}) {{{body}}}"


def _host_parameter(kernel: KernelSource, parameter: Parameter) -> str:
    if not parameter.is_buffer:
        return f"{parameter.type} {parameter.name}"
    const = "const " if parameter.space == "constant" else ""
    if _is_checked(kernel, parameter):
        return f"const Buffer<{const}{parameter.type}>& {parameter.name}"
    return f"{const}{parameter.type}{parameter.indirection} {parameter.name}"


def _is_checked(kernel: KernelSource, parameter: Parameter) -> bool:
    """Whether every use of a pointer is an index, so that a `Buffer` can take its place."""
    uses = re.findall(rf"\b{parameter.name}\b\s*(.)", kernel.body)
    return parameter.indirection == "*" and all(following == "[" for following in uses)


def _launcher(kernel: KernelSource) -> str:
    arguments = []
    slot = 0
    for p in kernel.parameters:
        if not p.is_buffer:
            position = POSITIONS[p.attribute or ""]
            arguments.append(f"{p.type}({', '.join(f'{position}.{axis}' for axis in 'xyz'[: COMPONENTS[p.type]])})")
            continue
        const = "const " if p.space == "constant" else ""
        pointer, count = f"({const}{p.type}*)buffers[{2 * slot}]", f"(size_t)buffers[{2 * slot + 1}] / sizeof({p.type})"
        checked = f"Buffer<{const}{p.type}>{{{pointer}, {count}}}"
        arguments.append(checked if _is_checked(kernel, p) else pointer if p.indirection == "*" else f"*{pointer}")
        slot += 1
    body = f"body_{kernel.name}"
    run = f"fibers::run_cooperative({body}, buffers, threads, group, order);" if kernel.is_cooperative else (
        f"fibers::run_independent<{body}>(buffers, threads, order);")
    return f"""
static void {body}(void** buffers, uint3 grid_position, uint3 group_position) {{
  {kernel.name}({', '.join(arguments)});
}}
extern "C" __attribute__((visibility("default"))) int launch_{kernel.name}(
    void** buffers, const uint* grid, const uint* group_size, int mode, int in_place, fibers::Statistics* statistics,
    char* error) {{
  const uint3 threads(grid[0], grid[1], grid[2]), group(group_size[0], group_size[1], group_size[2]);
  const auto order = static_cast<fibers::Order>(mode);
  fibers::statistics = {{}};
  fibers::error.clear();
  fibers::races.start(in_place);
  {run}
  fibers::statistics.racing_accesses = fibers::races.count;
  *statistics = fibers::statistics;
  std::snprintf(error, 256, "%s", fibers::error.c_str());
  return fibers::error.empty() ? 0 : 1;
}}"""
