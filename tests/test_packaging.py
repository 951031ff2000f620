"""Laws of the installed package: it imports from one place, in every working folder, with only torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest

import torch_xlstm_ops

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
# Print where every module of the package comes from, after an operator has run.
WHENCE = """
import sys
import torch
import torch_xlstm_ops
torch.ops.xlstm.mlstm_step_.default
for name, module in list(sys.modules.items()):
    if name.split(".")[0] in ("torch_xlstm_ops", "registrations"):
        print(module.__file__)
"""
# Make every import of an optional package fail, as it does where the package was installed alone.
ALONE = """
import sys
sys.modules.update(dict.fromkeys({names!r}))
"""


def python(code: str, *path: Path, cwd: Path) -> list[str]:
    """Run Python in a folder with `path` as PYTHONPATH; return the lines it prints."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=cwd, env=environment,
                          capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def check_one_place(files: Sequence[str], package: Path, registrations: Path) -> None:
    assert str(package / "__init__.py") in files
    assert str(registrations / "register.py") in files
    assert not [file for file in files if not file.startswith((f"{package}{os.sep}", f"{registrations}{os.sep}"))]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the packages and data that pyproject.toml names, as an installer does."""
    folder = tmp_path_factory.mktemp("site-packages")
    setuptools = PROJECT["tool"]["setuptools"]
    for name in setuptools["packages"]:
        source = ROOT / setuptools["package-dir"].get(name, name.replace(".", "/"))
        target = folder / name.replace(".", "/")
        target.mkdir()
        for file in source.glob("*.py"):
            shutil.copy(file, target)
    for name, patterns in setuptools["package-data"].items():
        for file in (file for pattern in patterns for file in (ROOT / name).glob(pattern)):
            (folder / file.relative_to(ROOT)).parent.mkdir(exist_ok=True)
            shutil.copy(file, folder / file.relative_to(ROOT))
    return folder


def test_pyproject_names_every_package() -> None:
    there = {
        ".".join(("torch_xlstm_ops", *file.parent.relative_to(top.parent).parts)[top.name == "torch_xlstm_ops":])
        for top in (ROOT / "torch_xlstm_ops", ROOT / "registrations") for file in top.rglob("__init__.py")
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == there


def test_a_checkout_imports_from_itself_in_its_root() -> None:
    check_one_place(python(WHENCE, cwd=ROOT), ROOT / "torch_xlstm_ops", ROOT / "registrations")


def test_a_checkout_on_the_path_imports_from_itself_elsewhere(tmp_path: Path) -> None:
    check_one_place(python(WHENCE, ROOT, cwd=tmp_path), ROOT / "torch_xlstm_ops", ROOT / "registrations")


def test_a_checkout_needs_no_installation(tmp_path: Path) -> None:
    unfind = "import sys\nsys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in repr(f)]\n"
    check_one_place(python(unfind + WHENCE, ROOT, cwd=tmp_path), ROOT / "torch_xlstm_ops", ROOT / "registrations")


@pytest.mark.parametrize("start", ["checkout", "elsewhere"])
def test_an_installed_package_first_on_the_path_imports_from_itself(
    installed: Path, tmp_path: Path, start: str
) -> None:
    # `python -c` puts the folder it starts in before PYTHONPATH; a console script does not.
    first = f"import sys\nsys.path.insert(0, {str(installed)!r})\n"
    found = python(first + WHENCE, cwd=ROOT if start == "checkout" else tmp_path)
    check_one_place(found, installed / "torch_xlstm_ops", installed / "torch_xlstm_ops/registrations")


def test_a_checkouts_root_comes_before_an_installed_package(installed: Path) -> None:
    check_one_place(python(WHENCE, installed, cwd=ROOT), ROOT / "torch_xlstm_ops", ROOT / "registrations")


def test_torch_is_enough(installed: Path, tmp_path: Path) -> None:
    extras = ("transformers", "safetensors", "rich", "ray", "optuna", "matplotlib", "tomli", "mlstm_kernels", "xlstm",
              "flashrnn", "tirex", "tirex2", "pytorch_forecasting", "tokenizers", "huggingface_hub", "setuptools")
    code = ALONE.format(names=extras) + WHENCE + "from torch_xlstm_ops.cli import main\nassert main(['info']) == 0\n"
    assert "  safetensors" in "\n".join(python(code, installed, cwd=tmp_path))


@pytest.mark.parametrize("command", ["--version", "info --device cpu"])
def test_the_command_line_runs_from_a_checkout(tmp_path: Path, command: str) -> None:
    done = subprocess.run([sys.executable, "-m", "torch_xlstm_ops", *command.split()], cwd=tmp_path, text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert torch_xlstm_ops.__version__ in done.stdout


def test_the_namespace_holds_public_names_and_modules_alone(tmp_path: Path) -> None:
    code = """
import sys, torch_xlstm_ops as ops
for name in dir(ops):
    module = sys.modules.get(f"torch_xlstm_ops.{name}")
    if name not in ops.__all__ and not (name[:2] == name[-2:] == "__") and getattr(ops, name) is not module:
        print(name)
assert set(ops.__all__) <= set(dir(ops))
"""
    assert python(code, ROOT, cwd=tmp_path) == []


@pytest.mark.slow  # it builds
def test_a_wheel_holds_the_package_and_imports_from_itself(installed: Path, tmp_path: Path) -> None:
    if find_spec("setuptools") is None:
        pytest.skip("needs setuptools")
    copy = tmp_path / "checkout"  # a build writes beside the sources
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "build", "*.egg-info", "__pycache__", ".*_cache"))
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", str(tmp_path)]
    done = subprocess.run([*build, str(copy)], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    held = {file.relative_to(tmp_path / "site") for file in (tmp_path / "site/torch_xlstm_ops").rglob("*.*")}
    assert held == {file.relative_to(installed) for file in installed.rglob("*.*") if "__pycache__" not in file.parts}
    found = python(WHENCE, tmp_path / "site", cwd=tmp_path)
    check_one_place(found, tmp_path / "site/torch_xlstm_ops", tmp_path / "site/torch_xlstm_ops/registrations")
    assert wheel.name.startswith(f"torch_xlstm_ops-{torch_xlstm_ops.__version__}-")
