"""Laws of kept kernels: the same results bit for bit, no Inductor in a process that finds them, nothing untrusted."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests import oracle
from torch_xlstm_ops import mlstm_chunkwise, slstm_sequence
from torch_xlstm_ops.maths import mlstm
from torch_xlstm_ops.runtime import compiler, kernel_store, torch_internals
from torch_xlstm_ops.runtime.kernel_store import (
    Damaged,
    Entry,
    Package,
    Request,
    Store,
    Untrusted,
    archive,
    identity,
    package,
)

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="kernels are kept on Linux alone")
STEP = mlstm.AXES[mlstm.step_]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """Keep this test's kernels in a folder of its own."""
    folder = tmp_path / "kernels"
    compiler.clear()
    kernel_store.follow(lambda: (folder, True))
    yield Store(folder)
    assert kernel_store.background.wait(60)
    kernel_store.follow(lambda: None)
    compiler.clear()


def step_arguments() -> list[Tensor]:
    sizes = [(1, 2, 4), (1, 2, 4), (1, 2, 4), (1, 2, 1), (1, 2, 1), (1, 2, 4, 4), (1, 2, 4), (1, 2, 1)]
    return [torch.randn(size, generator=torch.Generator().manual_seed(7)) for size in sizes]


def run_step() -> list[Tensor]:
    """Return h and the state that a step wrote in place."""
    args = step_arguments()
    return [*compiler.get(mlstm.step_, STEP, args, eps=1e-6)(list(args)), *args]


def kept(store: Store) -> list[Entry]:
    """Return the packages when all that was compiled is packed."""
    assert kernel_store.background.wait(60)
    return store.entries()


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(map(torch.equal, first, second))


def forward_and_backward() -> list[Tensor]:
    args = [t.requires_grad_() for t in oracle.draw(oracle.Sizes(B=1, S=40))]
    h, state = mlstm_chunkwise(*args, chunk_size=16)
    x, r, b = (torch.randn(size, generator=torch.Generator().manual_seed(3)).requires_grad_()
               for size in ((1, 7, 4, 2, 4), (4, 2, 4, 4), (4, 2, 4)))
    y = slstm_sequence(x, r, b)[0]
    queued = mlstm_chunkwise(*(t.detach() for t in args), chunk_size=16, schedule="queued")[0]
    return [h, *state, y, queued, *torch.autograd.grad(oracle.weigh([h, *state]), args),
            *torch.autograd.grad(y.sum(), [x, r, b])]


def test_a_kept_step_equals_the_compiled_one_bit_for_bit_in_place(store: Store, compiles: list[object]) -> None:
    compiled = run_step()
    assert len(kept(store)) == 1
    compiler.clear()
    assert same(run_step(), compiled)
    assert len(compiles) == 1
    assert not same(compiled[6:], step_arguments()[5:])  # the state was written


@pytest.mark.slow
def test_kept_kernels_equal_compiled_ones_bit_for_bit(store: Store, compiles: list[object]) -> None:
    torch.manual_seed(5)
    compiled = forward_and_backward()
    count = len(compiles)
    assert len(kept(store)) == count
    compiler.clear()
    torch.manual_seed(5)
    assert same(forward_and_backward(), compiled)
    assert len(compiles) == count


@pytest.mark.slow
def test_conditions_are_the_same_as_text(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, original = [], compiler._compile

    def watch(*args: object) -> object:
        found = original(*args)  # type: ignore[arg-type]
        seen.append(found[1])
        return found

    monkeypatch.setattr(compiler, "_compile", watch)
    forward_and_backward()
    for admits in seen:
        assert isinstance(admits, torch_internals.Conditions)
        read = kernel_store.conditions.read(admits.written())
        for G, NC in itertools.product((1, 2, 3, 16, 64, 65), (1, 2, 3, 64, 65, 200)):
            assert read({"G": G, "NC": NC}) == admits({"G": G, "NC": NC})


def child(script: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "XLSTM_OPS_KERNELS": str(folder), "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run([sys.executable, "-W", "error::RuntimeWarning", "-c", script], cwd=ROOT, env=environment,
                          capture_output=True, text=True, timeout=300)


STEP_IN_A_PROCESS = """
import sys, torch
from torch_xlstm_ops import mlstm_step_
torch.set_num_threads({threads})
g = torch.Generator().manual_seed(7)
args = [torch.randn(s, generator=g) for s in [(1, 2, 4)] * 3 + [(1, 2, 1)] * 2 + [(1, 2, 4, 4), (1, 2, 4), (1, 2, 1)]]
with torch.no_grad():
    h = mlstm_step_(*args)
print([m for m in sys.modules if m.startswith(("torch._dynamo", "torch._inductor"))])
print(h.flatten().tolist(), args[5].flatten().tolist())
"""


def test_a_process_that_finds_its_kernels_imports_neither_dynamo_nor_inductor(tmp_path: Path) -> None:
    first, second = (child(STEP_IN_A_PROCESS.format(threads=1), tmp_path / "kernels") for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert not second.stderr
    (loaded, *results), (none, *again) = first.stdout.splitlines(), second.stdout.splitlines()
    assert "torch._inductor.compile_fx" in loaded
    assert none == "[]"
    assert results == again


@pytest.mark.slow
def test_a_machine_without_a_compiler_runs_what_is_kept(tmp_path: Path) -> None:
    script = STEP_IN_A_PROCESS.format(threads=1)
    first, second = (child(script, tmp_path / "kernels", **more) for more in ({}, {"CXX": "/nowhere/g++"}))
    assert not second.stderr
    assert first.stdout.splitlines()[1] == second.stdout.splitlines()[1]


@pytest.mark.slow
def test_another_number_of_threads_is_another_kept_kernel(tmp_path: Path) -> None:
    for count in (1, 2):
        script = f"import torch; torch.set_num_threads({count})\n" + PROMPT_IN_A_PROCESS
        first, second = (child(script, tmp_path / "kernels") for _ in range(2))
        assert "compile_fx" in first.stdout
        assert second.stdout == "[]\n", second.stderr


PROMPT_IN_A_PROCESS = """
import sys, torch
from torch_xlstm_ops import mlstm_chunkwise
args = [torch.randn(1, 2, 40, 4) for _ in range(3)] + [torch.randn(1, 2, 40) for _ in range(2)]
with torch.no_grad():
    mlstm_chunkwise(*args, chunk_size=16)
print([m for m in sys.modules if m.startswith(("torch._dynamo", "torch._inductor"))])
"""


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "kernel changed": lambda folder: rewrite(folder / "0.so", lambda old: old[:-1] + bytes([old[-1] ^ 1])),
    "kernel truncated": lambda folder: rewrite(folder / "0.so", lambda old: old[:1000]),
    "kernel missing": lambda folder: (folder / "0.so").unlink(),
    "kernel a link": lambda folder: ((folder / "0.so").rename(folder / "x"), (folder / "0.so").symlink_to("x")),
    "kernel of others": lambda folder: (folder / "0.so").chmod(0o620),
    "manifest changed": lambda folder: rewrite(folder / "manifest", lambda old: old.replace(b"eps", b"spe")),
    "manifest empty": lambda folder: rewrite(folder / "manifest", lambda old: b""),
    "manifest missing": lambda folder: (folder / "manifest").unlink(),
    "manifest of others": lambda folder: (folder / "manifest").chmod(0o606),
    "package of others": lambda folder: folder.chmod(0o770),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_foreign_package_is_refused_with_a_warning_and_compiled_again(
    damage: str, store: Store, compiles: list[object]
) -> None:
    compiled = run_step()
    (entry,) = kept(store)
    DAMAGE[damage](store.folder / entry.key)
    assert store.wrong(entry.key) is not None
    compiler.clear()
    kernel_store_warnings = pytest.warns(RuntimeWarning, match="is not used: .*; it is compiled again")
    with kernel_store_warnings:
        assert same(run_step(), compiled)
    assert len(compiles) == 2
    kept(store)
    assert store.wrong(entry.key) is None  # the new one took its place


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_folder_that_others_can_write_is_not_used(mode: int, store: Store, compiles: list[object]) -> None:
    run_step()
    kept(store)
    store.folder.chmod(mode)
    compiler.clear()
    with pytest.warns(RuntimeWarning, match="are not used: others can write"):
        run_step()
    assert len(compiles) == 2
    with pytest.raises(Untrusted, match="others can write"):
        store.add("0" * 40, *made(1))


def test_another_compiler_compiles_again_and_none_uses_what_is_there(
    store: Store, compiles: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_step()
    kept(store)
    for here, expected in ((None, 1), ("another", 2)):
        monkeypatch.setattr(identity, "compiler", lambda here=here: here)
        compiler.clear()
        run_step()
        kept(store)
        assert len(compiles) == expected


def test_what_decides_a_kernel_is_in_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    def key(dtype: torch.dtype = torch.float32, size: int = 3, threads: int = 1, eps: float = 1e-6) -> str:
        args = [torch.zeros(1, size, dtype=dtype)]
        fn = compiler.functools.partial(mlstm.step, eps=eps)
        found = identity.request(fn, [("G", "D")], args, {"G": 11}, {"cpp.threads": threads}, {})
        assert found is not None
        return found.key

    plain = key()
    assert key() == plain
    found = {plain, key(torch.float64), key(size=4), key(threads=2), key(eps=1e-5)}
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    assert key() == plain
    monkeypatch.setenv("TORCHINDUCTOR_MAX_AUTOTUNE", "1")
    found.add(key())
    monkeypatch.delenv("TORCHINDUCTOR_MAX_AUTOTUNE")
    import torch._inductor.config as options

    with options.patch(epilogue_fusion=False):
        found.add(key())
    with options.patch(post_grad_custom_pre_pass=lambda graph: None):
        assert torch_internals.inductor_changes() is None
    assert key() == plain
    monkeypatch.setattr(identity, "_software", lambda: {"torch": "another"})
    found.add(key())
    assert len(found) == 8


def test_a_function_whose_source_is_unknown_is_not_kept(store: Store) -> None:
    def double(x: Tensor) -> tuple[Tensor, ...]:
        return (2 * x,)

    compiler.get(double, ("G D",), [torch.zeros(2, 3)])
    assert kept(store) == []


def made(number: int, size: int = 1000) -> tuple[Package, dict[str, bytes]]:
    """Return a package that only looks like one, and its files."""
    content = bytes(size)
    kernels = {"f": {"file": "0.so", "sha256": package.hashlib.sha256(content).hexdigest(), "module": "m",
                     "function": "f"}}
    return Package({"number": str(number)}, None, "", "True", kernels), {"0.so": content}


def add(store: Store, number: int, size: int = 1000) -> str:
    kept, contents = made(number, size)
    key = Request(kept.properties).key
    assert store.add(key, kept, contents)
    return key


def test_a_store_is_bounded_and_drops_what_was_not_used_for_longest(tmp_path: Path) -> None:
    store = Store(tmp_path / "kernels", capacity=6000)
    keys = [add(store, number) for number in range(3)]
    for age, key in zip((30, 10, 20), keys, strict=True):
        os.utime(store.folder / key / "manifest", (time.time() - age,) * 2)
    last = add(store, 3, size=4000)
    left = [entry.key for entry in store.entries()]
    assert last in left
    assert keys[0] not in left
    assert sum(entry.size for entry in store.entries()) <= 6000 + 1000  # a manifest is written after the others left
    assert not store.add("0" * 40, *made(9, size=7000))


def test_threads_that_keep_the_same_kernel_leave_one(tmp_path: Path) -> None:
    store, start, added = Store(tmp_path / "kernels"), threading.Barrier(8), []
    kept, contents = made(1, size=1 << 20)
    key = Request(kept.properties).key

    def write() -> None:
        start.wait(60)
        added.append(store.add(key, kept, contents))

    threads = [threading.Thread(target=write) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert added.count(True) == 1
    assert store.wrong(key) is None
    assert os.listdir(store.folder) == [key]


KILLED = """
import os, signal
from pathlib import Path
from tests.test_kernel_store import add
from torch_xlstm_ops.runtime.kernel_store import Store
os.{function} = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
add(Store(Path({folder!r})), 1)
"""


@pytest.mark.slow
@pytest.mark.parametrize("function", ["rename", "open"])
def test_a_process_that_is_killed_while_it_writes_leaves_no_package(function: str, tmp_path: Path) -> None:
    store = Store(tmp_path / "kernels")
    killed = child(KILLED.format(function=function, folder=str(store.folder)), store.folder)
    assert killed.returncode == -signal.SIGKILL
    assert store.entries() == []
    (partial,) = os.listdir(store.folder)
    add(store, 1)
    assert partial in os.listdir(store.folder)  # its writer may be alive
    os.utime(store.folder / partial, (time.time() - 7200,) * 2)
    store.prune(1 << 30)
    assert partial not in os.listdir(store.folder)


@pytest.mark.slow
def test_processes_that_race_leave_whole_kernels_and_the_same_results(tmp_path: Path) -> None:
    folder, script = tmp_path / "kernels", STEP_IN_A_PROCESS.format(threads=1)
    environment = {**os.environ, "XLSTM_OPS_KERNELS": str(folder), "PYTHONPATH": str(ROOT)}
    running = [subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=environment, stdout=subprocess.PIPE,
                                text=True) for _ in range(3)]
    results = {process.communicate(timeout=300)[0].splitlines()[1] for process in running}
    assert len(results) == 1
    store = Store(folder)
    assert [store.wrong(entry.key) for entry in store.entries()] == [None]


def test_an_archive_brings_kernels_to_another_store(store: Store, compiles: list[object], tmp_path: Path) -> None:
    compiled = run_step()
    kept(store)
    file = tmp_path / "kernels.zip"
    assert archive.write(store, file) == 1
    (entry,) = kept(store)
    store.remove(entry.key)
    file.chmod(0o600)
    assert archive.read(store, file) == archive.Imported(1, 0, {})
    assert archive.read(store, file) == archive.Imported(0, 1, {})
    assert store.read(entry.key).compiler is None  # used with every compiler
    compiler.clear()
    assert same(run_step(), compiled)
    assert len(compiles) == 1


def test_an_archive_for_another_machine_says_which_property_differs(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_step()
    kept(store)
    file = tmp_path / "kernels.zip"
    archive.write(store, file)
    file.chmod(0o600)
    here = {**identity.here(), "vectors": "another"}
    monkeypatch.setattr(identity, "here", lambda device=None: here)
    ((reason,), added) = [*archive.read(store, file).unfit.values()], archive.read(store, file).added
    assert reason.startswith("vectors must be ")
    assert reason.endswith("got 'another' here")
    assert added == 0


@pytest.mark.parametrize("name", ["../escape/0.so", "x", "0" * 40 + "/../0.so", "0" * 40 + "/0.so"])
def test_an_archive_of_something_else_adds_nothing(name: str, tmp_path: Path) -> None:
    store, file = Store(tmp_path / "kernels"), tmp_path / "kernels.zip"
    with zipfile.ZipFile(file, "w") as made_up:
        made_up.writestr(name, b"content")
    file.chmod(0o600)
    with pytest.raises(Damaged):
        archive.read(store, file)
    assert store.entries() == []
    file.write_bytes(b"no archive")
    with pytest.raises(Damaged, match="not an archive of kernels"):
        archive.read(store, file)
    file.chmod(0o666)
    with pytest.raises(Untrusted, match="others can write"):
        archive.read(store, file)


def test_a_folder_that_cannot_be_written_keeps_nothing_and_says_so_if_it_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    compiler.clear()
    for told in (True, False):
        kernel_store.follow(lambda told=told: (tmp_path / "file" / "kernels", told))
        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            run_step()
            assert kernel_store.background.wait(60)
        assert bool(given) == told
        compiler.clear()
    kernel_store.follow(lambda: None)


@pytest.mark.parametrize("source", [
    "import os\ndef call(args):\n    return os\n",
    "def call(args):\n    import os\n    return os\n",
    "helper = object\ndef call(args):\n    return args\n",
    "import torch\ndef call(args):\n    return torch._inductor\n",
])
def test_generated_code_that_needs_more_than_torch_is_not_taken_apart(source: str, tmp_path: Path) -> None:
    path = tmp_path / "generated.py"
    path.write_text(source)
    space: dict[str, object] = {"__file__": str(path)}
    exec(source, space)
    assert torch_internals.taken_apart(space["call"]) is None  # type: ignore[arg-type]
