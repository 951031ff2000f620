"""Time upstream packages unpatched and with `patch()`, each in its own process, in turns.

    python -m benchmarks.drop_ins                       # every package that is installed
    python -m benchmarks.drop_ins tirex2 --seconds 30 --json result.json

Models have random weights and the packages' default sizes. A package's own compile option is timed as well, on CUDA
each schedule of the sLSTM instead. Results are compared with the unpatched ones before anything is timed.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.timing import machine, save, timed

Call = Callable[[], Tensor]
MODES = {"cpu": ("theirs", "compiled", "patched"), "cuda": ("theirs", "sequential", "parallel")}


class Case(NamedTuple):
    """A model and its input, built in the process that runs it."""

    package: str
    build: Callable[[int, bool, torch.device], Call]  # (batch, use the package's compile option, device)
    batch: int
    tolerance: float  # relative error of patched against unpatched, Euclidean
    compiles: bool  # has a compile option
    device: str = "cpu"


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Fill every parameter with more than one axis with small random values of a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return model.eval()


def series(batch: int, length: int) -> Tensor:
    """Return noisy waves (batch, length)."""
    noise = torch.randn(batch, length, generator=torch.Generator().manual_seed(1))
    return torch.sin(torch.arange(length) / 9 + torch.arange(batch)[:, None]) + 0.1 * noise


def tirex2(batch: int, compiled: bool, device: torch.device, length: int = 512) -> Call:
    from tirex2 import TimeseriesType
    from tirex2.model.component.flashrnn_slstm import _FlashRNNLayer
    from tirex2.model.component.mlstm_block import mLSTMLayer
    from tirex2.model.tirex2 import TiRex2

    width, patch_size, blocks = 512, 32, 12
    templates = {
        f"bi-{cell}": {
            "time_mixer": {"model_type": f"bi-{cell}", "embedding_dim": width, "num_heads": 4, "num_slstm_heads": 4},
            "variate_mixer": {"embedding_dim": width, "num_heads": 4}, "dropout": 0.1, "eps": 1e-7,
        } for cell in ("mlstm", "slstm")
    }
    model: Any = randomised(TiRex2(
        stack_config={"templates": templates, "recipe": list(templates) * (blocks // 2)}, num_blocks=blocks,
        embedding_dim=width, input_patch_size=patch_size, output_patch_size=patch_size,
        quantiles=[n / 10 for n in range(1, 10)],
        tokenizer_cfg=dict.fromkeys(("output_patch_size", "input_patch_size", "input_patch_stride"), patch_size),
        scaler_cfg={"use_arcsinh": True, "binaryaware": True}, h_expand=4, context_len=2048, future_len=320,
        input_ff_dim=2048, act_func="SiLU", dropout=0.1, stack_out_norm_config={"eps": 1e-7}, device=device.type,
    )).to(device)
    if compiled:
        for layer in model.modules():
            if isinstance(layer, (mLSTMLayer, _FlashRNNLayer)):
                layer.compile()
    inputs = [TimeseriesType(target=row[None], past_covariates=None, future_covariates=None)
              for row in series(batch, length)]
    return lambda: torch.stack(model.predict(inputs, prediction_length=64))


def tirex(batch: int, compiled: bool, device: torch.device) -> Call:
    from tirex.models.slstm.cell import sLSTMCellTorch
    from tirex.models.tirex import TiRexZero

    config = {
        "input_patch_size": 32, "output_patch_size": 32, "quantiles": [n / 10 for n in range(1, 10)],
        "block_kwargs": {"num_blocks": 12, "embedding_dim": 512, "num_heads": 4}, "input_ff_dim": 2048,
    }
    model: Any = randomised(TiRexZero(backend="torch", model_config=config, train_ctx_len=2048))
    for block in model.blocks:
        cell = block.slstm_layer.slstm_cell
        torch.nn.init.normal_(cell._bias_, generator=torch.Generator().manual_seed(2))
        if compiled:
            cell._impl_forward_torch = torch.compile(sLSTMCellTorch.slstm_forward)
    context = series(batch, 512)
    return lambda: model._forecast_quantiles(context, prediction_length=64)[0]


def flashrnn(batch: int, compiled: bool, device: torch.device) -> Call:
    from flashrnn import flashrnn as run

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 256, 4, 4, 64, generator=generator)
    r = torch.randn(4, 4, 64, 64, generator=generator) / 8
    b = torch.randn(4, 4, 64, generator=generator)
    return lambda: run(x, r, b, function="slstm", backend="vanilla", dtype="float32")[0][0]


def xlstm(batch: int, compiled: bool, device: torch.device, length: int = 256) -> Call:
    """A stack of mLSTM and sLSTM blocks with the package's defaults, except an sLSTM backend that can run here."""
    tokens = torch.randn(batch, length, 128, generator=torch.Generator().manual_seed(1)).to(device)
    model = block_stack("vanilla", length).to(device)
    return lambda: model(tokens)


def xlstm_large(batch: int, compiled: bool, device: torch.device) -> Call:
    from xlstm.xlstm_large import xLSTMLarge, xLSTMLargeConfig

    model: Any = randomised(xLSTMLarge(xLSTMLargeConfig(
        embedding_dim=512, num_heads=4, num_blocks=6, vocab_size=2048, mode="inference", return_last_states=True,
        chunkwise_kernel="chunkwise--native_autograd", sequence_kernel="native_sequence__native", step_kernel="native",
    )))
    ids = torch.randint(2048, (batch, 511), generator=torch.Generator().manual_seed(1))
    return lambda: model(ids)[0]


def block_stack(backend: str, context: int = 256) -> Any:
    """Return an xlstm stack of two mLSTM blocks around an sLSTM block, width 128."""
    import xlstm as peer

    torch.manual_seed(0)
    return peer.xLSTMBlockStack(peer.xLSTMBlockStackConfig(
        mlstm_block=peer.mLSTMBlockConfig(mlstm=peer.mLSTMLayerConfig()),
        slstm_block=peer.sLSTMBlockConfig(slstm=peer.sLSTMLayerConfig(backend=backend)),
        context_length=context, num_blocks=3, embedding_dim=128, slstm_at=[1],
    )).eval()


CASES = {
    "tirex2, batch 1": Case("tirex2", tirex2, 1, 1e-3, True),
    "tirex2, batch 64": Case("tirex2", tirex2, 64, 1e-3, True),
    "tirex, batch 1": Case("tirex", tirex, 1, 5e-2, True),
    "tirex, batch 64": Case("tirex", tirex, 64, 5e-2, True),
    "xlstm stack, batch 4": Case("xlstm", xlstm, 4, 1e-4, False),
    "xlstm_large, prompt of 511": Case("xlstm", xlstm_large, 1, 1e-3, False),
    "flashrnn slstm, batch 4": Case("flashrnn", flashrnn, 4, 1e-4, False),
    # Unpatched, tirex-2 runs its sLSTM in bfloat16 on CUDA.
    "tirex2, 2,048 values, batch 8": Case("tirex2", functools.partial(tirex2, length=2048), 8, 5e-2, False, "cuda"),
    "xlstm stack, 1,024 tokens, batch 4": Case("xlstm", functools.partial(xlstm, length=1024), 4, 1e-4, False, "cuda"),
}


def work(name: str, mode: str, result: Path) -> None:
    """Build a case, write its result to a file, then time it once for each line of standard input."""
    case = CASES[name]
    torch.manual_seed(0)
    with ExitStack() as stack, torch.inference_mode():
        if mode not in ("theirs", "compiled"):
            from torch_xlstm_ops import config
            from torch_xlstm_ops.patch import patch

            stack.enter_context(patch(case.package))
            stack.enter_context(config.use(slstm_schedule="auto" if mode == "patched" else mode))
        device = torch.device(case.device)
        call = case.build(case.batch, mode == "compiled", device)
        torch.save(call().clone().float().cpu(), result)
        for _ in range(4):  # graphs are recorded at the second call and later ones
            call()
        print("ready", flush=True)
        for _ in sys.stdin:
            print(timed(call, device), flush=True)


@contextmanager
def worker(name: str, mode: str, threads: int, result: Path) -> Iterator[Callable[[], float]]:
    """Start a process for one contender, and yield a function that times one call."""
    command = [sys.executable, "-m", "benchmarks.drop_ins", name, "--threads", str(threads)]
    command += ["--worker", mode, str(result)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout
    try:
        line = ""
        while line != "ready":  # skip what the packages print
            text = stdout.readline()
            if not text:
                raise SystemExit(f"{name}, {mode}: ended with status {process.wait()} before it was ready")
            line = text.strip()

        def turn() -> float:
            print(file=stdin, flush=True)
            return float(stdout.readline())

        yield turn
    finally:
        stdin.close()
        process.wait()


def measure(name: str, seconds: float, threads: int) -> dict[str, Any]:
    """Return the median milliseconds of each contender of a case, and ratios to the unpatched one."""
    case = CASES[name]
    modes = [mode for mode in MODES[case.device] if case.compiles or mode != "compiled"]
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        files = {mode: Path(directory) / mode for mode in modes}
        turns = {mode: stack.enter_context(worker(name, mode, threads, files[mode])) for mode in modes}
        results = {mode: torch.load(path) for mode, path in files.items()}
        theirs, *others = results.values()
        error = max(float((t - theirs).norm() / theirs.norm()) for t in others)
        if not error <= case.tolerance:
            raise SystemExit(f"{name}: each must be within {case.tolerance} of unpatched, got {error}")
        taken: dict[str, list[float]] = {mode: [] for mode in modes}
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(taken["theirs"]) < 5:
            for mode, turn in turns.items():
                taken[mode].append(turn())
    medians = {mode: round(statistics.median(times), 3) for mode, times in taken.items()}
    return {"ms": medians, "error": error, "ratio": {m: round(t / medians["theirs"], 3) for m, t in medians.items()}}


def parity(steps: int, backend: str) -> list[float]:
    """Train a stack with an sLSTM block on bit parity, and return the loss of every step."""
    torch.manual_seed(0)
    stack = block_stack(backend, context=16).train()
    embed, head = torch.nn.Embedding(2, 128), torch.nn.Linear(128, 2)
    parameters = [*stack.parameters(), *embed.parameters(), *head.parameters()]
    optimizer, losses = torch.optim.AdamW(parameters, lr=1e-3), []
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        bits = torch.randint(2, (32, 16), generator=generator)
        loss = torch.nn.functional.cross_entropy(head(stack(embed(bits))).flatten(0, 1), bits.cumsum(1).flatten() % 2)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(round(loss.item(), 4))
    return losses


def train() -> dict[str, list[float]]:
    """Return the parity losses of the vanilla backend unpatched, and of the default one patched."""
    from torch_xlstm_ops.patch import patch

    theirs = parity(100, "vanilla")
    with patch("xlstm"):
        return {"vanilla, theirs": theirs[::10], "default, patched": parity(100, "cuda")[::10]}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("name", nargs="?", default="", help=f"the beginning of one of: {'; '.join([*CASES, 'parity'])}; default all")
    add("--seconds", type=float, default=20.0, help="of turns for each case (default %(default)s)")
    add("--threads", type=int, default=torch.get_num_threads(), help="of each process (default %(default)s)")
    add("--device", choices=[*MODES], default="cpu", help="where models run")
    add("--json", type=Path, help="file to write the result to")
    add("--worker", nargs=2, metavar=("MODE", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    if args.worker is not None:
        return work(args.name, args.worker[0], Path(args.worker[1]))
    chosen = {name: case for name, case in CASES.items() if name.startswith(args.name) and case.device == args.device}
    missing = {case.package for case in chosen.values() if importlib.util.find_spec(case.package) is None}
    result: dict[str, Any] = {"machine": machine(torch.device(args.device)), "missing": sorted(missing)}
    for name, case in chosen.items():
        if case.package not in missing:
            result[name] = measure(name, args.seconds, args.threads)
            print(name, json.dumps(result[name]), flush=True)
    if args.device == "cpu" and "parity".startswith(args.name) and importlib.util.find_spec("xlstm") is not None:
        result["parity"] = train()
    print(json.dumps(result, indent=1))
    save(result, args.json)
    return None


if __name__ == "__main__":
    main()
