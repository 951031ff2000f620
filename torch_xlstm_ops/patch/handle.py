"""Handles: `patch` replaces methods of upstream packages, and the handle that it returns puts them back."""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import cast

import torch

from torch_xlstm_ops.patch import releases
from torch_xlstm_ops.patch.replacements import (
    MARK,
    ActiveReplacement,
    Replacement,
    hold,
    live_tokens,
    lock,
    release,
    reset_compiled,
)
from torch_xlstm_ops.patch.targets import of_all_installed, of_model, of_packages


def patch(*targets: str | torch.nn.Module, compat: bool = False) -> Handle:
    """Make the named packages, or one model, run on our operators.

    targets: import or pip names of `PACKAGES`; or one model, of which only the layers are changed. Default every
        package of the table that is installed; one of these that cannot be patched is skipped with a warning.
    compat: repeat results that a package computes wrong, default false; docs/patching.md has the table.
    Raises ValueError for an unknown name or a model without xLSTM layers, ImportError for a package that is missing,
    RuntimeError for one that is too old, differs from the releases that we know, or is held with the other `compat`.
    Nothing is changed then.
    """
    models = [target for target in targets if isinstance(target, torch.nn.Module)]
    names = [target for target in targets if not isinstance(target, torch.nn.Module)]
    if len(models) > 1 or (models and names):
        raise ValueError(f"patch must get names of packages or one model, got {len(names)} names, {len(models)} models")
    if models:
        return Handle(of_model(models[0], compat), compat, models[0])
    chosen = [releases.import_name(name) for name in names]
    with lock:
        if names:
            return Handle(of_packages(list(dict.fromkeys(chosen)), compat), compat)
        found, left = of_all_installed(compat)
        return Handle(found, compat, left=left)


class Handle:
    """The replacements of one call of `patch`; each stays until every handle that holds it is removed."""

    def __init__(
        self, replacements: Sequence[Replacement], compat: bool = False, model: torch.nn.Module | None = None, *,
        left: Sequence[str] = (),
    ) -> None:
        self._left = tuple(left)
        # Unique among all processes: a pickled layer may carry its mark to another one.
        self._token = None if model is None else uuid.uuid4().hex
        with lock:
            self._held: Sequence[ActiveReplacement] = hold(replacements, compat, self._token)
            try:
                self._marked = [] if model is None else _mark(model, replacements, cast(str, self._token))
            except BaseException:
                release(self._held, self._token)
                raise
        self._removed = False

    def report(self) -> tuple[str, ...]:
        """Return one line for each attribute that this handle keeps replaced; nothing once it is removed.

        `patch()` without names adds a line for each package that it found and left as it is.
        """
        if self._removed:
            return ()
        lines = []
        for one in self._held:
            layers = sum(isinstance(ref(), one.replacement.layer_class) for ref in self._marked)
            where = "" if self._token is None else f" ({layers} layers of one model)"
            lines.append(f"{one.replacement.name}{where}: {one.replacement.effect}")
        return (*lines, *self._left)

    def remove(self) -> None:
        """Restore the attributes that no other handle keeps replaced. A second call does nothing.

        Raises RuntimeError, changing nothing, if other code replaced one of our attributes meanwhile.
        """
        with lock:
            if self._removed:
                return
            release(self._held, self._token)
            for module in (ref() for ref in self._marked):
                if module is not None:
                    _unmark(module, cast(str, self._token))
            self._removed = True

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def _mark(
    model: torch.nn.Module, replacements: Sequence[Replacement], token: str
) -> list[weakref.ref[torch.nn.Module]]:
    classes = tuple(one.layer_class for one in replacements)
    layers = [module for module in model.modules() if isinstance(module, classes)]
    live = live_tokens()
    for layer in layers:
        vars(layer)[MARK] = (*(other for other in vars(layer).get(MARK, ()) if other in live), token)
    reset_compiled()
    return [weakref.ref(layer) for layer in layers]


def _unmark(layer: torch.nn.Module, token: str) -> None:
    left = tuple(other for other in vars(layer).get(MARK, ()) if other != token)
    if left:
        vars(layer)[MARK] = left
    else:
        vars(layer).pop(MARK, None)
    reset_compiled()
