"""Laws of kept functions for CUDA: the same launches as Inductor's, and nothing is kept that is not understood."""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import fake_cuda
from tests.test_kernel_store import child
from torch_xlstm_ops.runtime import kernel_store, state, torch_internals
from torch_xlstm_ops.runtime.kernel_store import Request, Store, archive, identity

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="kernels are kept on Linux alone")
GPU = torch.device("cuda", 0)
# As Inductor writes it: x + 1 by the first kernel, times a matrix, and a copy by the second.
WRAPPER = '''
import torch
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.select_algorithm import extern_kernels
from torch._C import _cuda_getCurrentRawStream as get_raw_stream

aten = torch.ops.aten
empty_strided_cuda = torch._C._dynamo.guards._empty_strided_cuda
reinterpret_tensor = torch._C._dynamo.guards._reinterpret_tensor
async_compile = AsyncCompile()

triton_poi_fused_0 = async_compile.triton('triton_poi_fused_0', """def triton_poi_fused_0(): pass""", device_str='cuda')
triton_red_fused_1 = async_compile.triton('triton_red_fused_1', """def triton_red_fused_1(): pass""", device_str='cuda')

async_compile.wait(globals())
del async_compile

class Runner:
    def __init__(self, partitions):
        self.partitions = partitions

    def call(self, args):
        arg0_1, arg1_1 = args
        args.clear()
        s0, s1 = arg0_1.size()
        with torch.cuda._DeviceGuard(0):
            torch.cuda.set_device(0)
            buf0 = empty_strided_cuda((s0, s1), (s1, 1), torch.float32)
            triton_poi_fused_0_xnumel = s0*s1
            stream0 = get_raw_stream(0)
            triton_poi_fused_0.run(arg0_1, buf0, triton_poi_fused_0_xnumel, stream=stream0)
            buf1 = empty_strided_cuda((s0, s1), (s1, 1), torch.float32)
            extern_kernels.mm(buf0, arg1_1, out=buf1)
            buf2 = empty_strided_cuda((s0, s1), (s1, 1), torch.float32)
            triton_red_fused_1.run(buf1, buf2, s0, s1, stream=stream0)
            aten.add_.Scalar(arg0_1, 1.0)
        return (reinterpret_tensor(buf2, (s1, s0), (1, s1), 0), )

runner = Runner(partitions=[])
call = runner.call
recursively_apply_fns = None
'''
POINTWISE = ({"grid_type": "Grid1D"}, {"XBLOCK": 8}, ["in_ptr0", "out_ptr0", "xnumel", "XBLOCK"], "OOi", 0, 4)
REDUCTION = ({"grid_type": "Grid2DWithYZOverflow"}, {"XBLOCK": 1, "YBLOCK": 2},
             ["in_ptr0", "out_ptr0", "ynumel", "xnumel", "XBLOCK", "YBLOCK"], "OOil", 4096, 2)


class Compiled:
    """What Inductor leaves in a process: a generated module, whose kernels the installed torch launches."""

    def __init__(self, folder: Path, put: fake_cuda.Set, *, modules: bool, source: str = WRAPPER) -> None:
        from torch._inductor import async_compile, utils
        from torch._inductor.runtime import triton_heuristics
        from torch.utils._ordered_set import OrderedSet

        self._heuristics: Any = triton_heuristics
        self.gpu, self.folder, self.put = fake_cuda.install(put, modules=modules), folder, put
        put(triton_heuristics, "triton_cache_dir", lambda device: str(folder / "triton" / str(device)))
        put(triton_heuristics, "triton_hash_to_path_key", lambda text: text.upper())
        self.tuners = {"triton_poi_fused_0": self.tuner("triton_poi_fused_0", *POINTWISE),
                       "triton_red_fused_1": self.tuner("triton_red_fused_1", *REDUCTION)}
        path = folder / "generated.py"
        path.write_text(source)
        self.space: dict[str, Any] = {"__file__": str(path), "__name__": "generated"}
        put(async_compile, "AsyncCompile", lambda: SimpleNamespace(
            triton=lambda name, source, device_str: self.tuners[name], wait=lambda space: None))
        exec(compile(source, str(path), "exec"), self.space)
        self.call = utils.align_inputs_from_check_idxs(self.space["call"], [0, 1], OrderedSet([0]))

    def tuner(
        self, name: str, meta: dict[str, Any], blocks: dict[str, int], names: list[str], types: str, shared: int,
        warps: int,
    ) -> Any:
        """Return a kernel of Inductor with its choice made, of the classes of this torch, as far as they matter."""
        from torch._inductor.runtime import static_triton_launcher

        kind = type("Config", (self._heuristics.Config,), {})  # of Triton, or object where there is none
        config: Any = object.__new__(kind)
        config.kwargs, config.num_warps, config.num_stages = blocks, warps, 1
        path = self.folder / "triton" / "0" / f"{name}-HASH".upper() / f"{name}.cubin"
        path.parent.mkdir(parents=True)
        path.write_bytes(fake_cuda.MACHINE_CODE + name.encode())
        kernel: Any = object.__new__(static_triton_launcher.StaticallyLaunchedCudaKernel)
        constants = [at for at, arg in enumerate(names) if arg.isupper()]
        vars(kernel).update(
            name=name, cubin_path=str(path), cubin_raw=b"", arg_names=names, declared_constexprs=constants,
            full_constexprs=constants, hash=f"{name}-hash", num_warps=warps, shared=shared, arg_tys=types,
            has_global_scratch=True, has_profile_scratch=True, module=None, n_regs=32, n_spills=0,
            function=self.gpu._load_kernel(str(path), name, shared, 0)[-3],
        )
        compile_meta = {"constants": dict(blocks), "signature": dict.fromkeys(names), "device": 0,
                        "device_type": "cuda"}
        result = self._heuristics.StaticTritonCompileResult(kernel, config, compile_meta, meta)
        tuner = object.__new__(self._heuristics.CachingAutotuner)
        vars(tuner).update(launchers=[result.make_launcher()], compile_results=[result], inductor_meta=meta)
        tuner.run = lambda *args, stream: tuner.launchers[0](*args, stream=stream)
        return tuner

    def taken_apart(self) -> torch_internals.Generated | None:
        return torch_internals.taken_apart(self.call)


Make = Callable[..., Compiled]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Return a function that makes what Inductor leaves in a process."""
    def put(owner: object, name: str, value: object) -> None:
        monkeypatch.setattr(owner, name, value, raising=False)

    folder = tmp_path / "inductor"
    folder.mkdir()
    return lambda *, modules=False, source=WRAPPER: Compiled(folder, put, modules=modules, source=source)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "kernels")


def arguments(*sizes: int) -> list[Tensor]:
    return [torch.arange(float(sizes[0] * sizes[1])).view(*sizes), torch.eye(sizes[1])]


def request(**more: str) -> Request:
    return Request({**identity.here(GPU), "function": "f", **more})


class Always(torch_internals.Conditions):
    """Conditions that any sizes meet."""

    def __init__(self) -> None:
        super().__init__({}, [])


def keep(store: Store, compiled: Compiled, wanted: Request) -> list[Tensor]:
    """Call what was compiled, so that it is kept, and return the results."""
    call = store.keep(wanted, compiled.call, Always())
    results = [*call(arguments(5, 3))]
    assert kernel_store.background.wait(60)
    assert [entry.key for entry in store.entries()] == [wanted.key]
    return results


CHILD = """
import sys

class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch._inductor", "torch._dynamo", "triton"):
            raise AssertionError(f"{name} is imported")

sys.meta_path.insert(0, Forbidden())
from tests import fake_cuda
print(fake_cuda.run_kept(sys.argv[1], sys.argv[2], (5, 3)))
"""


def test_a_process_without_inductor_launches_the_same_and_computes_the_same(make: Make, store: Store) -> None:
    compiled, wanted = make(), request()
    results = keep(store, compiled, wanted)
    script = CHILD.replace("sys.argv[1]", repr(str(store.folder))).replace("sys.argv[2]", repr(wanted.key))
    told = child(script, store.folder)
    assert told.returncode == 0, told.stderr
    assert not told.stderr
    loaded, launched, computed = ast.literal_eval(told.stdout)
    assert sorted(loaded) == sorted(compiled.gpu.loaded)
    assert launched == compiled.gpu.launched
    assert computed == [t.tolist() for t in results]
    assert launched[0] == ("triton_poi_fused_0", 2, 1, 1, 4, 0, "OOiOO", [[5, 3], [5, 3], 15, None, None], 7)
    assert launched[1][:7] == ("triton_red_fused_1", 3, 3, 1, 2, 4096, "OOilOO")


@pytest.mark.parametrize("modules", [False, True])
def test_a_kept_function_is_loaded_again_and_writes_its_argument(make: Make, store: Store, modules: bool) -> None:
    compiled, wanted = make(modules=modules), request()
    results = keep(store, compiled, wanted)
    found = store.find(wanted)
    assert found is not None
    args = arguments(5, 3)
    x = args[0]
    assert [t.tolist() for t in found.call(args)] == [t.tolist() for t in results]
    assert args == []
    assert torch.equal(x, arguments(5, 3)[0] + 1)
    half = len(compiled.gpu.launched) // 2
    assert compiled.gpu.launched[:half] == compiled.gpu.launched[half:]


def test_arguments_at_odd_addresses_are_copied_and_written_back(make: Make, store: Store) -> None:
    compiled, wanted = make(), request()
    (expected,) = keep(store, compiled, wanted)
    found = store.find(wanted)
    assert found is not None
    for call in (compiled.call, found.call):
        x, eye = arguments(5, 3)
        odd = torch.empty(16)[1:].view(5, 3).copy_(x)
        assert odd.data_ptr() % 16
        assert torch.equal(call([odd, eye])[0], expected)
        assert torch.equal(odd, x + 1)


def test_a_function_is_kept_after_its_first_call_and_no_earlier(make: Make, store: Store) -> None:
    compiled = make()
    tuner = compiled.tuners["triton_poi_fused_0"]
    chosen, original = tuner.launchers, tuner.run
    tuner.launchers = chosen * 2  # two configurations

    def choose(*args: object, stream: int) -> None:
        tuner.launchers = chosen
        original(*args, stream=stream)

    tuner.run = choose
    assert compiled.taken_apart() is None
    call = store.keep(request(), compiled.call, Always())
    with pytest.raises(IndexError):
        call([torch.ones(2, 2)])
    assert kernel_store.background.wait(60)
    assert store.entries() == []
    for _ in range(2):
        call(arguments(5, 3))
        assert kernel_store.background.wait(60)
        assert len(store.entries()) == 1


def test_a_kernel_whose_choice_stays_open_is_not_kept(make: Make, store: Store) -> None:
    compiled = make()
    tuner = compiled.tuners["triton_red_fused_1"]
    tuner.launchers = tuner.launchers * 2
    store.keep(request(), compiled.call, Always())(arguments(5, 3))
    assert kernel_store.background.wait(60)
    assert store.entries() == []


def change_attribute(name: str, value: object) -> Callable[[Compiled], None]:
    def change(compiled: Compiled) -> None:
        setattr(kernel_of(compiled), name, value)

    return change


def kernel_of(compiled: Compiled) -> Any:
    return compiled.tuners["triton_poi_fused_0"].compile_results[0].kernel


def change_launcher(compiled: Compiled) -> None:
    (launcher,) = compiled.tuners["triton_poi_fused_0"].launchers
    other: dict[str, Any] = {}
    exec("def launcher(in_ptr0, out_ptr0, xnumel, stream):\n"
         "    grid_0 = -((xnumel) // -(8))\n    grid_1 = 2\n    grid_2 = 1\n"
         "    runner(grid_0, grid_1, grid_2, stream, in_ptr0, out_ptr0, xnumel)", other)
    launcher.__code__ = other["launcher"].__code__


def use_triton_launcher(compiled: Compiled) -> None:
    compiled.tuners["triton_poi_fused_0"].launchers[0]._is_static = False


def add_plugin(compiled: Compiled) -> None:
    compiled.tuners["triton_poi_fused_0"]._plugins = [object()]


def debug(compiled: Compiled) -> None:
    compiled.tuners["triton_poi_fused_0"].__class__ = compiled._heuristics.DebugAutotuner


def remove_code(compiled: Compiled) -> None:
    next((compiled.folder / "triton").rglob("triton_poi_fused_0.cubin")).unlink()


def add_wrapper(compiled: Compiled) -> None:
    inner = compiled.call
    compiled.call = lambda args: inner(args)


def another_alignment(compiled: Compiled) -> None:
    from torch._inductor import utils

    compiled.put(utils, "ALIGNMENT", 32)


@pytest.mark.parametrize("change", [
    change_attribute("tensordesc_meta", [1]), change_attribute("device_agnostic", True),
    change_attribute("arg_tys", "OO"), change_attribute("num_warps", None), change_launcher, use_triton_launcher,
    add_plugin, debug, remove_code, add_wrapper, another_alignment,
])
def test_a_kernel_that_is_not_understood_is_not_kept(make: Make, change: Callable[[Compiled], None]) -> None:
    compiled = make()
    assert compiled.taken_apart() is not None
    change(compiled)
    assert compiled.taken_apart() is None


@pytest.mark.parametrize(("before", "after"), [
    ("triton_poi_fused_0_xnumel, stream=stream0", "triton_poi_fused_0_xnumel, grid=(1, 1, 1), stream=stream0"),
    ("triton_poi_fused_0.run(arg0_1, buf0, triton_poi_fused_0_xnumel, stream=stream0)", "print(triton_poi_fused_0)"),
    ("extern_kernels.mm(", "extern_kernels.bias_addmm("),
    ("aten.add_.Scalar(arg0_1, 1.0)", "torch.ops.inductor.anything(arg0_1)"),
    ("aten.add_.Scalar(arg0_1, 1.0)", "_tensor_constant0"),
    ("aten.add_.Scalar(arg0_1, 1.0)", "_filled"),
])
def test_a_wrapper_that_is_not_understood_is_not_kept(make: Make, before: str, after: str) -> None:
    assert before in WRAPPER
    compiled = make(source=WRAPPER.replace(before, after) + "\n_filled = None\n")
    compiled.space.update(_tensor_constant0=torch.ones(1), _filled=torch.ones(1))
    assert compiled.taken_apart() is None


def test_the_launcher_that_holds_its_constants_is_used_where_inductor_uses_it(make: Make, store: Store) -> None:
    compiled, wanted = make(modules=True), request()
    bind = type("_FastCudaLauncher", (fake_cuda.BoundLauncher,), {
        "__init__": lambda self, *fixed: fake_cuda.BoundLauncher.__init__(self, compiled.gpu, *fixed)})
    compiled.put(torch._C, "_FastCudaLauncher", bind)
    tuner, kernel = compiled.tuners["triton_poi_fused_0"], kernel_of(compiled)
    (launcher,) = tuner.launchers
    bound = bind(kernel.function, 4, 0, "OOi", 2)
    tuner._cached_launcher = FunctionType(launcher.__code__, {**launcher.__globals__, "runner": bound})
    results = keep(store, compiled, wanted)
    assert "_FastCudaLauncher" not in store.read(wanted.key).source
    assert "_bound_launcher(_triton_poi_fused_0, 4, 0, 'OOi', 2)" in store.read(wanted.key).source
    found = store.find(wanted)
    assert found is not None
    assert torch.equal(found.call(arguments(5, 3))[0], results[0])
    half = len(compiled.gpu.launched) // 2
    assert compiled.gpu.launched[:half] == compiled.gpu.launched[half:]


@pytest.mark.parametrize("valid", [False, True], ids=["other bytes", "refused by the driver"])
def test_damaged_machine_code_is_refused_with_a_warning(make: Make, store: Store, valid: bool) -> None:
    compiled, wanted = make(), request()
    keep(store, compiled, wanted)
    kept, contents = store.read(wanted.key), store.contents(wanted.key)
    assert sorted(contents) == ["0.cubin", "1.cubin"]
    state.reset()
    if valid:
        store.remove(wanted.key)
        entry = next(name for name, kernel in kept.kernels.items() if kernel["file"] == "0.cubin")
        kernels: Mapping[str, Any] = {**kept.kernels, entry: {
            **kept.kernels[entry], "sha256": hashlib.sha256(b"no machine code").hexdigest()}}
        store.add(wanted.key, kept._replace(kernels=kernels), {**contents, "0.cubin": b"no machine code"})
    else:
        (store.folder / wanted.key / "0.cubin").write_bytes(b"no machine code")
    reason = "device kernel image is invalid" if valid else "its file 0.cubin has another hash"
    with pytest.warns(RuntimeWarning, match=f"{reason}; it is compiled again"):
        assert store.find(wanted) is None


def test_a_torch_without_the_launcher_finds_nothing(make: Make, store: Store) -> None:
    compiled, wanted = make(), request()
    keep(store, compiled, wanted)
    compiled.put(torch._C, "_StaticCudaLauncher", None)
    assert store.find(wanted) is None


def test_an_archive_has_machine_code_and_names_another_gpu(
    make: Make, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, wanted = make(), request()
    keep(store, compiled, wanted)
    file, other = tmp_path / "kernels.zip", Store(tmp_path / "others")
    archive.write(store, file)
    file.chmod(0o600)
    assert archive.read(other, file) == archive.Imported(1, 0, {})
    assert other.contents(wanted.key) == store.contents(wanted.key)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    identity.forget()
    (reason,) = archive.read(Store(tmp_path / "third"), file).unfit.values()
    identity.forget()
    assert reason == "gpu must be 'none', got 'NVIDIA H200, capability 9.0, 132 multiprocessors' here"


def properties(index: int) -> SimpleNamespace:
    return SimpleNamespace(name="NVIDIA H200", major=9, minor=0, multi_processor_count=132)


def found_for(device: str, names: Sequence[str] = ()) -> Mapping[str, str]:
    from torch_xlstm_ops.maths import mlstm

    sizes = ((1, 2, 4), (1, 2, 4), (1, 2, 4), (1, 2, 1), (1, 2, 1), (1, 2, 4, 4), (1, 2, 4), (1, 2, 1))
    args: list[Any] = [SimpleNamespace(device=torch.device(device), shape=size, dtype=torch.float32) for size in sizes]
    axes = [names.split() for names in mlstm.AXES[mlstm.step_]]
    found = kernel_store.request(mlstm.step_, axes, args, {}, {}, {})
    assert found is not None
    return found.properties


def test_the_key_has_the_gpu_and_triton_and_not_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    identity.forget()
    here = found_for("cuda:0")
    assert {"gpu", "cuda", "triton", "device"} <= here.keys()
    assert not {"processor", "vectors"} & here.keys()
    assert not {"gpu", "cuda", "triton", "device"} & found_for("cpu").keys()
    assert {name for name, value in found_for("cuda:1").items() if here[name] != value} == {"device"}
    monkeypatch.setenv("TRITON_CACHE_DIR", "/set/by/inductor")  # as is the other one
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(Path(torch.__file__).parent / "bin" / "ptxas"))
    assert found_for("cuda:0") == here
    for name in ("TRITON_PTXAS_PATH", "TRITON_DEFAULT_FP_FUSION", "DISABLE_PTXAS_OPT"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "0")
            assert found_for("cuda:0") != here
            assert name == "TRITON_PTXAS_PATH" or name not in found_for("cpu")["settings"]
    identity.forget()


def test_kernels_are_kept_for_gpus_of_nvidia_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernel_store.unsupported(GPU) is None
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert kernel_store.unsupported(GPU) == "kernels for GPUs are kept on NVIDIA's alone"
    assert kernel_store.unsupported(torch.device("cpu")) is None
