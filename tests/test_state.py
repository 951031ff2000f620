"""Laws of module state: one `reset()` reaches every mutable global, and the package works after it."""

from __future__ import annotations

import ast
import warnings

import pytest
import torch

from tests.oracle import Sizes, draw
from tests.test_house import MODULES
from torch_xlstm_ops import config, mlstm_chunkwise
from torch_xlstm_ops.config import tuned_plans
from torch_xlstm_ops.runtime import compiler, state
from torch_xlstm_ops.schedules.queue import worker_threads

REGISTERS = ("on_reset", "forget_with")
CONTAINERS = {
    "BoundedCache", "Counter", "OrderedDict", "WeakKeyDictionary", "WeakSet", "WeakValueDictionary", "count",
    "defaultdict", "deque", "dict", "list", "local", "set",
}
MUTATORS = {
    "add", "append", "appendleft", "clear", "discard", "extend", "insert", "move_to_end", "pop", "popitem", "popleft",
    "remove", "setdefault", "update",
}
IMPORT = "filled when modules are imported, which happens once"
PURE = "caches a function of its arguments alone"
# Mutable globals that `reset` leaves alone, and why.
EXEMPT = {
    "config.active:_listeners": IMPORT,
    "config.tuned_plans:_processor": PURE,
    "models.identity:_known": "checked against the model's weights at each use",
    "models.transformers:_parameters": PURE,
    "patch.kept_blocks:_folder": PURE,
    "patch.kept_blocks:_version": PURE,
    "patch.replacements:_active": "belongs to handles, which restore the originals",
    "registrations.devices:kept_whole": PURE,
    "registrations.dynamo.substitution:_findings": "lives as long as the graph that is being compiled",
    "registrations.dynamo.substitution:_installed": "Dynamo keeps the rules of a process",
    "ops.mlstm.step:_overlaps": PURE,
    "registrations.sharding:_types": IMPORT,
    "runtime.compiler:INLINED": IMPORT,
    "runtime.compiler:_compiling_thread": "the thread that compiles now",
    "runtime.compiler:_forked_from_compiling": "how this process began",
    "runtime.compiler:_has_compiled": "modules stay imported",
    "maths.shapes:_split": PURE,
    "runtime.compiler:_split": PURE,
    "runtime.cuda_graphs:_fixed": "the objects that exist",
    "runtime.torch_internals.modes:_active": "the modes that are entered now",
    "runtime.forks:_has_kernels": "threads stay started",
    "runtime.forks:_in_child": IMPORT,
    "runtime.forks:_locks": "the locks that exist",
    "runtime.forks:unsettled": "how this process began",
    "runtime.kernel_store:_choices": IMPORT,
    "runtime.import_hook:_awaited": "registrations with packages that are not imported yet",
    "runtime.import_hook:_finder": "registrations with packages that are not imported yet",
    "runtime.state:_resets": "the list of registered functions",
    "runtime.torch_internals.conditions:_env_class": PURE,
    "runtime.torch_internals.inductor_choices:_choices": PURE,
    "runtime.torch_internals.dispatch:_autocast_keys": PURE,
    "runtime.torch_internals.dispatch:_next_is_device": PURE,
    "runtime.torch_internals.dynamo:_ONE_GRAPH": "a sentinel",
    "runtime.torch_internals.modules:_UNKNOWN": "a sentinel",
    "runtime.torch_internals.need:NEEDS": IMPORT,
    "schedules.plan:make": PURE,
    "schedules.queue.task_runner:_streams": "streams that later calls use again",
    "schedules.queue.worker_threads:_local": "says whether a thread is a worker",
    "schedules.ray.cluster:_inherited": "how this process began",
    "schedules.ray.serialization:suppress_read_only_warning": "torch gives the warning once a process",
    "trace.spans:_recordings": "belongs to `with trace.record()` blocks",
}
TREES = {name.removeprefix("torch_xlstm_ops."): ast.parse(path.read_text()) for name, path in MODULES.items()}


def called(node: ast.expr | None) -> str:
    """Return the last part of the name of what an expression calls, or nothing."""
    function = node.func if isinstance(node, ast.Call) else None
    function = function.value if isinstance(function, ast.Subscript) else function
    return getattr(function, "attr", getattr(function, "id", ""))


def is_stateful(node: ast.ClassDef) -> bool:
    """Return whether instances of a class may change, and do not register themselves."""
    text = ast.unparse(node)
    fixed = {getattr(base, "id", "") for base in node.bases} & {"Enum", "Exception", "NamedTuple", "Protocol"}
    return not fixed and "frozen=True" not in text and not any(f"{name}(" in text for name in REGISTERS)


CLASSES = {node.name: node for tree in TREES.values() for node in tree.body if isinstance(node, ast.ClassDef)}
STATEFUL = {name for name, node in CLASSES.items() if is_stateful(node)}
LOCKS = {"Lock", "RLock"}


def assigned(tree: ast.Module) -> dict[str, ast.expr | None]:
    """Return the global variables of a module with their initial values."""
    found: dict[str, ast.expr | None] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            found |= {target.id: node.value for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = node.value
    return found


def changed(tree: ast.Module) -> set[str]:
    """Return the names that functions of a module declare global, or whose content they change."""
    found: set[str] = set()
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        for node in ast.walk(function):
            if isinstance(node, ast.Global):
                found |= set(node.names)
            elif isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
                found.add(getattr(node.value, "id", ""))
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS:
                found.add(getattr(node.func.value, "id", ""))
    return found


def mutable(tree: ast.Module) -> set[str]:
    """Return the names of a module's mutable globals and cached functions."""
    values = assigned(tree)
    safe = (CLASSES.keys() - STATEFUL) | LOCKS  # instances of our own classes that are fixed, or register themselves
    found = {name for name in changed(tree) & values.keys() if called(values[name]) not in safe}
    for name, value in values.items():
        empty = isinstance(value, (ast.Dict, ast.List)) and not getattr(value, "keys", getattr(value, "elts", ()))
        if name != "__all__" and (empty or called(value) in CONTAINERS | STATEFUL):
            found.add(name)
    cached = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)
              and any(ast.unparse(d).split("(")[0].endswith("cache") for d in node.decorator_list)}
    return found | cached


def registered(tree: ast.Module) -> set[str]:
    """Return the names that registered functions of a module use, directly or through its other functions."""
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and called(node) in REGISTERS]
    roots: list[ast.AST] = [argument for call in calls for argument in call.args]
    roots += [f for f in functions.values() if any(getattr(d, "id", "") == "on_reset" for d in f.decorator_list)]
    found: set[str] = set()
    while roots:
        names = {node.id for node in ast.walk(roots.pop()) if isinstance(node, ast.Name)}
        roots += [functions[name] for name in (names - found) & functions.keys()]
        found |= names
    return found


@pytest.mark.parametrize("module", TREES)
def test_every_mutable_global_is_registered_or_has_a_reason(module):
    left = {f"{module}:{name}" for name in mutable(TREES[module]) - registered(TREES[module])} - EXEMPT.keys()
    assert not left, f"register these by runtime.state.on_reset, or give a reason: {sorted(left)}"


def test_every_exemption_is_needed():
    found = {f"{module}:{name}" for module, tree in TREES.items() for name in mutable(tree) - registered(tree)}
    assert sorted(EXEMPT.keys() - found) == []


def test_reset_clears_caches_pools_and_warnings_and_calls_work_after_it():
    args = draw(Sizes(S=20), state=False)
    expected, _ = mlstm_chunkwise(*args, chunk_size=16, schedule="queued")
    tuned_plans.entries(tuned_plans.default_file())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            state.warn_once("told")
        state.reset()
        assert not compiler._callables
        assert not tuned_plans.entries.cache_info().currsize
        assert not worker_threads._by_size
        state.warn_once("told")
    assert [str(warning.message) for warning in told] == ["told", "told"]
    assert config.current() == config.reload()
    found, _ = mlstm_chunkwise(*args, chunk_size=16, schedule="queued")
    assert torch.equal(found, expected)
