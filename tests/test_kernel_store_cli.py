"""Laws of `kernels`, and of the kernels of a transformers block."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.conftest import Command
from torch_xlstm_ops import config, mlstm_chunkwise, mlstm_step_, slstm_sequence, slstm_step
from torch_xlstm_ops.models import DEMO_MODEL
from torch_xlstm_ops.patch import kept_blocks, patch
from torch_xlstm_ops.patch.traced import traced
from torch_xlstm_ops.registrations import register
from torch_xlstm_ops.runtime import compiler, kernel_store

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="kernels are kept on Linux alone")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Keep kernels in the folder that the configuration names, as outside the tests."""
    compiler.clear()
    kernel_store.follow(register.chosen_store)
    yield tmp_path / "kernels"
    kernel_store.follow(lambda: None)
    config.reload(flags={})
    compiler.clear()


def error(result: tuple[int, str, str]) -> str:
    assert result[0] == 2
    return result[2].removeprefix("xlstm-ops: error: ").strip()


@pytest.mark.slow
def test_kernels_are_warmed_listed_verified_exchanged_and_pruned(run: Command, folder: Path, tmp_path: Path) -> None:
    at = ("--kernels", folder)
    added = re.match(r"(\d) kernels added, \1 there\n", run("kernels", "warm", *at, "--shape", "2x4x4")[1])
    assert added
    count = int(added[1])  # some are compiled again where a call has several threads
    assert count >= 4
    compiler.clear()
    assert run("kernels", "warm", *at, "--shape", "2x4x4")[1] == f"0 kernels added, {count} there\n"
    listed = run("kernels", "ls", *at)[1]
    assert len(listed.splitlines()) == 1 + count
    assert "float32[G NC 64 4]" in listed
    assert re.search(rf"for this machine and installation +{count}\n", run("kernels", "stats", *at)[1])
    assert run("kernels", "verify", *at)[:2] == (0, f"{count} kernels, 0 damaged\n")
    file, other = tmp_path / "kernels.zip", ("--kernels", tmp_path / "other")
    assert run("kernels", "export", file, *at)[:2] == (0, f"{count} kernels: {folder} -> {file}\n")
    file.chmod(0o600)
    assert run("kernels", "import", file, *other)[1].startswith(f"{count} kernels added, 0 there, 0 do not fit")
    kernel = next(folder.glob("*/0.so"))
    kernel.unlink()  # this process has it mapped
    kernel.write_bytes(b"")
    assert run("kernels", "verify", *at)[0] == 1
    assert run("kernels", "verify", *at, "--remove")[1].endswith(f"{count} kernels, 1 damaged and removed\n")
    assert run("kernels", "prune", *at, "--bytes", "0")[1].endswith("; 0 left, 0 bytes\n")


def mlstm_calls(B: int, S: int) -> None:
    (q, k, v), (igate, fgate) = torch.randn(3, B, 2, S, 4), torch.randn(2, B, 2, S)
    _, state = mlstm_chunkwise(q, k, v, igate, fgate)
    mlstm_chunkwise(q, k, v, igate, fgate, *state)
    one = [t[:, :, 0] for t in (q, k, v)], [t[:, :, :1] for t in (igate, fgate)]
    mlstm_step_(*one[0], *one[1], *state)


def slstm_calls(B: int, S: int) -> None:
    x, r, b = torch.randn(B, S, 4, 2, 4), torch.randn(4, 2, 4, 4), torch.randn(4, 2, 4)
    _, state = slstm_sequence(x, r, b)
    slstm_sequence(x, r, b, *state)
    slstm_step(x[:, 0], r, b, *state)


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "calls", "batches"), [
    (("--shape", "2x4x4"), mlstm_calls, [1]), (("--shape", "2x4x4", "--batch", "3"), mlstm_calls, [3]),
    (("--slstm", "2x4"), slstm_calls, [1, 3]),
])
def test_no_length_of_a_warmed_layer_is_compiled_again(
    flags: tuple[str, ...], calls: Callable[[int, int], None], batches: list[int], run: Command, folder: Path,
    compiles: list[object],
) -> None:
    assert run("kernels", "warm", "--kernels", folder, *flags)[0] == 0
    assert compiles
    compiles.clear()
    compiler.clear()
    with torch.no_grad():
        for B in batches:
            for S in (1, 2, 5, 64, 77, 400):
                calls(B, S)
    assert compiles == []


@pytest.mark.slow
def test_no_prompt_of_a_warmed_model_is_compiled_again(run: Command, folder: Path, compiles: list[object]) -> None:
    pytest.importorskip("transformers")
    assert run("kernels", "warm", "--kernels", folder, "--model", DEMO_MODEL)[1].endswith(" there\n")
    assert compiles
    compiles.clear()
    for prompt in ("a", "ab", "abcde" * 13, "abcde" * 60):
        compiler.clear()
        flags = ("--max-new-tokens", "2", "--kernels", folder, "--prompt", prompt)
        assert run("generate", *flags)[0] == 0
    assert compiles == []


def test_bad_flags_of_kernels_are_one_line(run: Command, folder: Path) -> None:
    at = ("--kernels", folder)
    assert error(run("kernels", "ls", *at, "--bytes", "1")) == "--bytes must come with prune, got ls"
    assert error(run("kernels", "ls", "file", *at)) == "FILE must come with export or import, got ls"
    assert error(run("kernels", "export", *at)) == "export must come with FILE"
    assert error(run("kernels", "prune", *at)).startswith("prune must come with --bytes SIZE")
    assert error(run("kernels", "warm", *at)) == (
        "warm must come with --model DIR, --shape NHxDHQKxDHHV or --slstm NHxDH")
    assert error(run("kernels", "warm", *at, "--shape", "2x4")).endswith("such as 4x64x128, got '2x4'")
    assert error(run("kernels", "warm", *at, "--shape", "2x4x4", "--batch", "0")).startswith("--batch must be ")
    assert error(run("kernels", "warm", *at, "--slstm", "2x4x4")) == "--slstm must be NHxDH, such as 4x64, got '2x4x4'"
    assert error(run("kernels", "ls", *at, "--slstm", "2x4")) == "--slstm must come with warm, got ls"
    assert error(run("kernels", "warm", *at, "--shape", "2x4x4", "--dtype", "int8")).endswith("got 'int8'")
    assert error(run("kernels", "ls", "--kernels", "off")) == "kernels must be on or a folder, got off"
    assert error(run("kernels", "ls", "--kernels", "maybe")).endswith("got 'maybe'")
    assert error(run("kernels", "import", folder, *at)).startswith("FILE must be what export wrote, got ")
    folder.mkdir(mode=0o700)
    folder.chmod(0o777)
    assert "others can write" in error(run("kernels", "ls", *at))


def test_info_tells_the_folder_of_kernels_and_where_none_are_kept(run: Command, folder: Path) -> None:
    assert f"kept in  {folder}" in run("info", "--kernels", folder, "--device", "cpu")[1]
    assert re.search(r"\nkernels\n  off\n", run("info", "--kernels", "off", "--device", "cpu")[1])
    assert kernel_store.unsupported(torch.device("mps")) == "kernels for mps are kept by Inductor alone"


def block_name(model: torch.nn.Module) -> str | None:
    compiler.clear()
    block = traced(model.backbone.blocks[0], "cpu")  # type: ignore[union-attr, index, arg-type]
    assert block is not None
    return block.forward.kept_as()


def test_a_block_has_a_name_unless_other_code_changed_its_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.xlstm import modeling_xlstm

    settings = transformers.xLSTMConfig(hidden_size=16, num_heads=2, num_blocks=1, vocab_size=32, mode="inference")
    model = transformers.xLSTMForCausalLM(settings).eval()
    handle = patch("transformers")
    try:
        name = block_name(model)
        assert name is not None
        assert block_name(model) == name
        settings.eps = 0.5
        changed = block_name(transformers.xLSTMForCausalLM(settings).eval())
        assert changed not in (None, name)
        with monkeypatch.context() as other:
            other.setattr(modeling_xlstm, "soft_cap", lambda x, cap: x, raising=False)
            assert block_name(model) is None
        with monkeypatch.context() as other:
            other.setattr(kept_blocks, "_version", lambda package: "another")
            assert block_name(model) not in (None, name)
    finally:
        handle.remove()
    assert block_name(model) != name  # the original functions run


GENERATE = """
import sys
from torch_xlstm_ops import cli
from torch_xlstm_ops.runtime import compiler
compiles, original = [], compiler._compile
compiler._compile = lambda *args: compiles.append(args[0]) or original(*args)
status = cli.main(["generate", "--max-new-tokens", "3", "--quiet"])
print(len(compiles), "torch._inductor.compile_fx" in sys.modules)
sys.exit(status)
"""


@pytest.mark.slow
def test_a_second_generate_loads_no_inductor_and_writes_the_same_text(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    environment = {**os.environ, "XLSTM_OPS_KERNELS": str(tmp_path / "kernels"), "PYTHONPATH": str(ROOT)}
    texts, compiled = [], []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", GENERATE], env=environment, cwd=ROOT, capture_output=True,
                              text=True, timeout=300, check=True)
        *text, last = done.stdout.splitlines()
        texts.append(text)
        compiled.append(last)
    assert compiled == ["2 True", "0 False"]
    assert texts[0] == texts[1]
