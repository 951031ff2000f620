"""Laws of handles, on a made-up package: what is replaced, for which instances, and how it is restored."""

from __future__ import annotations

import copy
import importlib.metadata
import io
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import together
from torch_xlstm_ops.patch import Replacement, Upstream, patch, releases, upstream
from torch_xlstm_ops.patch.on_import import patch_from_environment, patch_on_import
from torch_xlstm_ops.runtime import state


class Layer(torch.nn.Module):
    """A layer of the made-up package."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(Layer(), Layer())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


PATCHED, UNPATCHED = torch.tensor(30.0), torch.tensor(12.0)  # two layers from 10 of "+ 10", of "+ 1"
KERNELS: dict[str, Any] = {"native": "theirs"}


def build(theirs: Any) -> Any:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return x + 10

    return forward


def replacements(compat: bool) -> list[Replacement]:
    return [
        Replacement(Layer, "forward", build, "adds ten", ("self", "x")),
        Replacement(KERNELS, "native", lambda theirs: f"ours for {theirs}", "resolves to ours", place="kernel native"),
        Replacement(KERNELS, "new", lambda theirs: "ours", "resolves to ours", place="kernel new"),
    ]


def make_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `patch` know the package."""
    peer, drop_in = types.ModuleType("made_up"), types.ModuleType("made_up_drop_in")
    drop_in.replacements = replacements  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "made_up", peer)
    monkeypatch.setitem(sys.modules, "made_up_drop_in", drop_in)
    row = Upstream("made_up_drop_in", "made-up", (1, 0), (1, 4), "made_up")
    monkeypatch.setattr(upstream, "PACKAGES", {"made_up": row})
    version(monkeypatch, "1.2.3")


@pytest.fixture(autouse=True)
def made_up(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make `patch` know the package, and check that every test restores it."""
    make_up(monkeypatch)
    monkeypatch.setattr(state, "_told", set())
    before = dict(vars(Layer))
    yield
    assert dict(vars(Layer)) == before
    assert KERNELS == {"native": "theirs"}


def version(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: text)


def ten() -> torch.Tensor:
    return torch.tensor(10.0)


def test_entries_of_registries_are_replaced_and_restored() -> None:
    with patch("made_up") as handle:
        assert KERNELS == {"native": "ours for theirs", "new": "ours"}
        assert "kernel new: resolves to ours" in handle.report()


def test_a_package_is_known_by_its_pip_name() -> None:
    with patch("made-up"):
        assert torch.equal(Model()(ten()), PATCHED)


def test_one_model_alone_is_patched() -> None:
    model, other = Model(), Model()
    with patch(model) as handle:
        assert torch.equal(model(ten()), PATCHED)
        assert torch.equal(other(ten()), UNPATCHED)
        assert KERNELS == {"native": "theirs"}
        (line,) = handle.report()
        assert line.endswith("Layer.forward (2 layers of one model): adds ten")
    assert torch.equal(model(ten()), UNPATCHED)
    assert all(set(vars(layer)) == set(vars(Layer())) for layer in model.layers)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_handles_on_models_and_packages_nest_in_any_order(order: tuple[int, ...]) -> None:
    model, other = Model(), Model()
    handles = [patch(model), patch("made_up"), patch(model.layers)]
    held = {0, 1, 2}
    for index in order:
        handles[index].remove()
        held.remove(index)
        assert torch.equal(model(ten()), PATCHED if held else UNPATCHED)
        assert torch.equal(other(ten()), PATCHED if 1 in held else UNPATCHED)


def test_copies_of_a_patched_model_are_patched_as_long_as_it_is() -> None:
    model = Model()
    with patch(model):
        twin = copy.deepcopy(model)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        loaded = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
        assert torch.equal(twin(ten()), PATCHED)
        assert torch.equal(loaded(ten()), PATCHED)
    assert torch.equal(twin(ten()), UNPATCHED)
    with patch(Model()):  # another handle's marks are not theirs
        assert torch.equal(twin(ten()), UNPATCHED)
        assert torch.equal(loaded(ten()), UNPATCHED)


SAVE = """
import sys, pytest, torch
from tests import test_patch_handles as laws
with pytest.MonkeyPatch.context() as context:
    laws.make_up(context)
    model = laws.Model()
    with laws.patch(model), laws.patch(laws.Model()):
        torch.save(model, sys.argv[1])
"""


def test_a_model_that_another_process_saved_while_patched_is_not_patched_here(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    subprocess.run([sys.executable, "-c", SAVE, str(file)], check=True, cwd=Path(__file__).parent.parent,
                   timeout=120)
    with patch(Model()), patch(Model()):
        loaded = torch.load(file, weights_only=False)
        assert torch.equal(loaded(ten()), UNPATCHED)
        with patch(loaded):
            assert torch.equal(loaded(ten()), PATCHED)
    assert all(set(vars(layer)) == set(vars(Layer())) for layer in loaded.layers)


class Fixed(type):
    """Classes whose attributes cannot be set."""

    def __setattr__(cls, name: str, value: object) -> None:
        raise TypeError(f"{name} is fixed")


class FixedLayer(Layer, metaclass=Fixed):
    pass


def test_a_patch_that_fails_on_the_way_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    last = Replacement(FixedLayer, "forward", build, "adds ten", ("self", "x"))
    with monkeypatch.context() as context:
        context.setattr(sys.modules["made_up_drop_in"], "replacements", lambda compat: [*replacements(compat), last])
        for target in ("made_up", torch.nn.Sequential(Layer(), FixedLayer())):
            with pytest.raises(TypeError, match="forward is fixed"):
                patch(target)
            assert torch.equal(Model()(ten()), UNPATCHED)
            assert KERNELS == {"native": "theirs"}
        context.setattr(sys.modules["made_up_drop_in"], "replacements", replacements)
        held = patch("made_up")
        context.setattr(sys.modules["made_up_drop_in"], "replacements", lambda compat: [*replacements(compat), last])
        with pytest.raises(TypeError, match="forward is fixed"):
            patch("made_up")
    assert torch.equal(Model()(ten()), PATCHED)
    held.remove()
    assert torch.equal(Model()(ten()), UNPATCHED)


def test_compiled_models_follow_patch_and_removal_of_the_model() -> None:
    model, other = Model(), Model()
    compiled, others = (torch.compile(one, backend="eager", fullgraph=True) for one in (model, other))
    for _ in range(2):
        assert torch.equal(compiled(ten()), UNPATCHED)
        with patch(compiled):
            assert torch.equal(compiled(ten()), PATCHED)
            assert torch.equal(others(ten()), UNPATCHED)
        assert torch.equal(compiled(ten()), UNPATCHED)


def test_a_freed_model_leaves_no_record() -> None:
    model = Model()
    handle = patch(model)
    del model
    handle.remove()


def test_threads_patch_models_of_their_own() -> None:
    def work() -> None:
        for _ in range(20):
            model = Model()
            with patch(model):
                assert torch.equal(model(ten()), PATCHED)
            assert torch.equal(model(ten()), UNPATCHED)

    together.run([work] * 4)


def test_a_model_without_known_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="a model to patch must have xLSTM layers of made_up, got Linear without"):
        patch(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="must get names of packages or one model, got 1 names, 1 models"):
        patch("made_up", Model())


def test_the_other_compat_is_refused_while_one_is_held() -> None:
    with patch("made_up"), pytest.raises(RuntimeError, match="is held with compat=False: remove that handle first"):
        patch("made_up", compat=True)
    with patch("made_up", compat=True):
        pass


def test_an_old_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    version(monkeypatch, "0.9")
    with pytest.raises(RuntimeError, match=r"made_up must be made-up>=1.0, got 0.9: pip install 'made-up>=1.0'"):
        patch("made_up")
    with pytest.raises(RuntimeError, match=r"nothing could be patched: made_up must be"):
        patch()


def test_a_newer_version_without_differences_is_patched_without_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    version(monkeypatch, "1.5.0")
    with patch("made_up") as handle:
        assert len(handle.report()) == 3


def test_a_newer_version_that_differs_warns_once_and_is_patched_where_it_does_not(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    version(monkeypatch, "1.5.0")
    with monkeypatch.context() as context:
        context.setattr(Layer, "forward", lambda self, x, y=None: x + 1)
        message = r"made_up 1.5.0 differs from 1.0 to 1.4, .* is not patched where it differs: .*must take \(self, x\)"
        with pytest.warns(RuntimeWarning, match=message):
            handle = patch("made_up")
        assert len(handle.report()) == 2
        assert torch.equal(Model()(ten()), UNPATCHED)
        handle.remove()
        patch("made_up").remove()


def test_a_newer_version_in_which_everything_differs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    version(monkeypatch, "1.5.0")
    unlike = Replacement(Layer, "forward", build, "adds ten", ("self", "x"), uses=(("forward", ("self", "y")),))
    monkeypatch.setattr(sys.modules["made_up_drop_in"], "replacements", lambda compat: [unlike])
    with pytest.raises(RuntimeError, match=r"made_up 1.5.0 differs from .* cannot be patched: .*\(self, y\)"):
        patch("made_up")


def test_what_was_found_and_left_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    made, old = upstream.PACKAGES["made_up"], Upstream("made_up_drop_in", "old", (2, 0), (2, 4), "made_up")
    monkeypatch.setitem(sys.modules, "old", types.ModuleType("old"))
    monkeypatch.setattr(upstream, "PACKAGES", {"made_up": made, "old": old})
    monkeypatch.setattr(upstream, "OTHERS", {"old": "not touched: another recurrence", "absent": "not there"})
    with pytest.warns(RuntimeWarning, match="not patched: old must be old>=2.0, got 1.2.3"):
        handle = patch()
    assert handle.report()[3:] == (
        "old: not touched: another recurrence",
        "old: not touched: old must be old>=2.0, got 1.2.3: pip install 'old>=2.0'",
    )
    with patch("made_up") as other:
        assert len(other.report()) == 3
    handle.remove()
    assert handle.report() == ()


@pytest.mark.parametrize("providers", [{"made_up": ["made-up-fork"]}, {}], ids=["fork", "no distribution"])
def test_a_fork_is_patched_if_checks_pass(monkeypatch: pytest.MonkeyPatch, providers: dict[str, list[str]]) -> None:
    def version(name: str) -> str:
        if name != "made-up-fork":
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.1"

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: providers)
    assert releases.found("made_up") == (("0.1", "made-up-fork") if providers else (None, None))
    for name in ("made_up", "made-up", *(["made-up-fork", "Made_up.fork"] if providers else [])):
        with patch(name) as handle:
            assert len(handle.report()) == 3
    with monkeypatch.context() as context:
        context.setattr(Layer, "forward", lambda self, x, y=None: x + 1)
        with pytest.warns(RuntimeWarning, match="made_up (0.1|of unknown version) differs from 1.0 to 1.4"):
            patch("made_up").remove()


def test_a_tested_version_that_differs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as context:
        context.setattr(Layer, "forward", lambda self, x, y=None: x + 1)
        with pytest.raises(RuntimeError, match=r"must take \(self, x\) to be patched, got \(self, x, y\)"):
            patch("made_up")


@pytest.mark.parametrize("gone", [Replacement(Layer, "other", build, "", ("self", "x")),
                                  Replacement(Layer, "forward", build, "", uses=(("other", ("self",)),))])
def test_a_missing_attribute_fails_the_check(monkeypatch: pytest.MonkeyPatch, gone: Replacement) -> None:
    others = replacements(False)[1:]
    monkeypatch.setattr(sys.modules["made_up_drop_in"], "replacements", lambda compat: [*others, gone])
    message = r"the owner of .*Layer\.(other|forward) must have other to be patched, got none"
    with pytest.raises(RuntimeError, match=message):
        patch("made_up")
    version(monkeypatch, "1.5.0")
    with pytest.warns(RuntimeWarning, match=message):
        patch("made_up").remove()


def test_a_half_imported_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(compat: bool) -> list[Replacement]:
        raise AttributeError("module 'made_up' has no attribute 'Layer'")

    monkeypatch.setattr(sys.modules["made_up_drop_in"], "replacements", broken)
    with pytest.raises(RuntimeError, match=r"made_up differs from the releases .* has no attribute"):
        patch("made_up")


def test_an_attribute_that_other_code_replaced_is_not_replaced_again(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = patch("made_up")
    with monkeypatch.context() as context:
        context.setattr(Layer, "forward", lambda self, x: x)
        for attempt in (handle.remove, lambda: patch("made_up")):
            with pytest.raises(RuntimeError, match=r"Layer.forward was replaced by other code after patch\(\)"):
                attempt()
    handle.remove()


def test_a_package_imported_already_is_patched_at_once() -> None:
    watch = patch_on_import()
    assert torch.equal(Model()(ten()), PATCHED)
    assert len(watch.report()) == 3
    watch.remove()
    assert watch.report() == ()


def test_a_package_that_cannot_be_patched_is_imported_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    version(monkeypatch, "0.9")
    with pytest.warns(RuntimeWarning, match="made_up is not patched: made_up must be made-up>=1.0, got 0.9"):
        watch = patch_on_import("made_up")
    assert watch.report() == ()
    watch.remove()


def test_the_environment_asks_for_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLSTM_OPS_PATCH", " ")
    assert patch_from_environment() is None
    for value in ("auto", "made_up", " made-up "):
        monkeypatch.setenv("XLSTM_OPS_PATCH", value)
        watch = patch_from_environment()
        assert watch is not None
        assert len(watch.report()) == 3
        watch.remove()
    monkeypatch.setenv("XLSTM_OPS_PATCH", "made_upp")
    with pytest.raises(ValueError, match="XLSTM_OPS_PATCH must be auto or names of made_up, got 'made_upp'"):
        patch_from_environment()
