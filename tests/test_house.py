"""The house: imports point downwards, effects stay in registrations/, and importing does nothing else."""

from __future__ import annotations

import ast
import contextlib
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Each floor may import from itself and from those before it.
FLOORS = [
    ["checkout"],
    ["runtime"],
    ["maths", "config", "trace"],
    ["kernels"],
    ["schedules"],
    ["ops"],
    ["registrations"],
    ["api"],
    ["modules"],
    ["patch"],
    ["backend"],
    ["explain"],
    ["models"],
    ["context"],
    ["parallel"],
    ["tune"],
    ["cli"],
]
# Floors that see less than what lies below them.
ONLY = {
    "maths": set(),
    "kernels": {"runtime", "maths"},
    "schedules": {"runtime", "config", "trace", "maths", "kernels"},
    "api": {"maths"},
    "modules": {"maths", "api"},
    "models": set(),
}
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
SOURCES = [
    path for top in ("torch_xlstm_ops", "registrations") for path in sorted((ROOT / top).rglob("*.py"))
    if path != ROOT / "torch_xlstm_ops/__init__.py" and path.name != "__main__.py" and "examples" not in path.parts
]


BACKEND = {"dynamo"}  # loaded on its own, by Dynamo's entry point


def room(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] != "registrations":
        return parts[1]
    return "backend" if parts[1] in BACKEND else "registrations"


def imports(path: Path) -> set[str]:
    """Return the rooms of this package that a file imports from, wherever the import stands."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        rooms |= {name.split(".")[1] for name in names if name.startswith("torch_xlstm_ops.")}
    return rooms


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path):
    here = room(path)
    found = imports(path) - {here}
    assert found <= LEVEL.keys(), "a new room needs a floor"
    above = {other for other in found if LEVEL[other] > LEVEL[here]}
    assert not above, f"{here} imports from above: {above}"
    if here in ONLY:
        assert found <= ONLY[here]


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "torch_xlstm_ops" else ("torch_xlstm_ops", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in SOURCES}


def imported(name: str) -> set[str]:
    """Return the modules of this package that a module imports, wherever the import stands."""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            names = [".".join(filter(None, [*start, node.module, alias.name])) for alias in node.names]
        else:
            continue
        # What is imported is a module, or a name in one.
        found |= {other if other in MODULES else other.rpartition(".")[0] for other in names}
    return (found & MODULES.keys()) - {name}


def test_no_files_import_each_other_in_a_circle():
    graph = {name: imported(name) for name in MODULES}
    with contextlib.suppress(IndexError):
        while graph:  # remove what imports nothing that is left; what cannot be removed is in a circle, or above one
            done = [name for name, others in graph.items() if not others & graph.keys()]
            del graph[done[0]]
    assert not graph, f"these import each other: {sorted(graph)}"


def test_files_are_short():
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in SOURCES}
    assert statistics.median(lines.values()) <= 150
    assert not {name: count for name, count in lines.items() if count > 250}


def test_functions_are_short():
    long = {
        f"{path.relative_to(ROOT)}: {node.name}"
        for path in SOURCES for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno - node.lineno >= 50
    }
    assert not long


# Writes to registries of torch and of Python, and the only other file that may hold each.
EFFECTS = {
    "register_backend": None, "substitute_in_graph": None, "custom_op(": None, "torch.library.": None, ".impl(": None,
    "register_sharding": None, "register_flop_formula": None, "meta_path": "torch_xlstm_ops/runtime/import_hook.py",
    "_decomp.register_decomposition": "torch_xlstm_ops/runtime/torch_internals/decompositions.py",  # for registrations
    "make_fallback": "torch_xlstm_ops/runtime/torch_internals/decompositions.py",
}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_effects_are_in_registrations_alone(path):
    if room(path) in ("registrations", "backend"):
        return
    text = path.read_text()
    for effect, allowed in EFFECTS.items():
        assert effect not in text or str(path.relative_to(ROOT)) == allowed, f"{effect} outside registrations/"


def test_importing_starts_nothing():
    check = """
import sys, threading
import torch_xlstm_ops
heavy = {"torch._inductor.compile_fx", "transformers", "ray", "optuna", "rich", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
assert threading.active_count() == 1
"""
    subprocess.run([sys.executable, "-W", "error", "-c", check], check=True, cwd=ROOT.parent, timeout=120)


def test_registrations_has_one_identity():
    run = subprocess.run([sys.executable, "-c", "import registrations"], cwd=ROOT, capture_output=True, text=True,
                         timeout=120)
    assert "import torch_xlstm_ops instead" in run.stderr
