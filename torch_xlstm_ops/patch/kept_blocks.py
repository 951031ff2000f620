"""A name for a compiled block of an upstream package that holds in every process with the same code.

The block's code is not ours: the name has the code of its classes and of their modules' functions, the versions of
their packages, and which of their methods we replaced. Where other code replaced a function, there is no name.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import sys
from collections.abc import Iterator, Sequence
from types import CodeType, FunctionType, ModuleType

from torch_xlstm_ops.patch import replacements

_OURS = __name__.partition(".")[0]
_PACKAGES = ("transformers", "xlstm", "mlstm_kernels")  # they take blocks and functions from each other
Facts = tuple[Sequence[str], object]  # the marks of a module, and what a trace reads in it


def name(kinds: Sequence[type], facts: Sequence[Facts]) -> str | None:
    """Return the name of a block, or None if other code changed its classes.

    kinds: the classes of its modules, in order. facts: likewise.
    """
    code = []
    for kind in dict.fromkeys(kinds):
        module = sys.modules.get(kind.__module__)
        if module is None or kind.__module__.startswith("torch."):
            code.append(kind.__qualname__)  # torch's version is known
            continue
        owners: list[ModuleType | type] = [module, *_classes(module)]
        for owner in owners:
            for found in _functions(owner):
                text = _text(found, owner)
                if text is None:
                    return None
                code.append(text)
    parts = [(replacements.in_effect(marks), read) for marks, read in facts]
    names = [f"{kind.__module__}.{kind.__qualname__}" for kind in kinds]
    told = repr((names, parts, code, [(package, _version(package)) for package in _PACKAGES]))
    return f"block {hashlib.sha256(told.encode()).hexdigest()}"


def _classes(module: ModuleType) -> list[type]:
    return [found for found in vars(module).values() if isinstance(found, type)
            and found.__module__ == module.__name__]


def _functions(owner: ModuleType | type) -> Iterator[FunctionType]:
    for found in vars(owner).values():
        found = getattr(found, "__func__", found)  # of a static or class method
        if isinstance(found, FunctionType):
            yield found


def _text(function: FunctionType, owner: ModuleType | type) -> str | None:
    """Return what tells a function from others, or None for one that is of no known package."""
    written, place = function.__module__ or "", f"{function.__module__}.{function.__qualname__}"
    if function.__code__.co_filename.startswith(_folder()):
        return place  # our source is known
    home = owner.__name__ if isinstance(owner, ModuleType) else owner.__module__
    root = written.partition(".")[0]
    if root not in (*_PACKAGES, "torch") and root not in sys.stdlib_module_names:
        return None
    return f"{place} {_code(function.__code__)}" if written == home else place


@functools.cache
def _folder() -> str:
    return str(sys.modules[_OURS].__file__).removesuffix("__init__.py")


def _code(code: CodeType) -> str:
    constants = [_code(one) if isinstance(one, CodeType) else _constant(one) for one in code.co_consts]
    return repr((code.co_code, constants, code.co_names, code.co_varnames, code.co_freevars))


def _constant(value: object) -> str:
    return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)


@functools.cache
def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return getattr(sys.modules.get(package), "__version__", None)
