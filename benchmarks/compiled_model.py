"""Time a transformers xLSTM under the backend `xlstm`, and compare it with eager, patched, and plain Inductor.

    python -m benchmarks.compiled_model --json result.json      # CPU, float32, hidden 512, 8 layers
    python -m benchmarks.compiled_model --preset 7b --device cuda --kernel limit_chunk --json result.json

The preset `7b` is xLSTM-7B's shape with 4 blocks, in bfloat16.

The contenders take turns in one process, call by call, so that other load of the machine affects all of them. Each is
first compared with the eager model, at this dtype's tolerance. `linear` times only the model's Linear layers, a lower
bound for every backend. Compile time is that of the first call with an empty Inductor cache.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.timing import alternate, machine, save, timed
from torch_xlstm_ops.models import transformers as adapter
from torch_xlstm_ops.patch import patch

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5}  # of logits that are capped at 30
PRESETS: dict[str, dict[str, Any]] = {
    "small": {"hidden": 512, "layers": 8, "heads": 4, "vocabulary": 256, "dtype": "float32", "prompt": 512},
    # xLSTM-7B: heads of (256, 512); 4 of its 32 blocks.
    "7b": {"hidden": 4096, "layers": 4, "heads": 8, "vocabulary": 50304, "dtype": "bfloat16", "prompt": 8192},
}


class Contender(NamedTuple):
    """One way to run the model."""

    backend: str | None = None  # None: eager
    mode: str | None = None
    inline: bool | None = None
    patched: bool = False


EAGER = {"eager": Contender(), "eager patched": Contender(patched=True)}
COMPILED = {
    "inductor": Contender("inductor"),
    "xlstm": Contender("xlstm"),
    "xlstm, all inline": Contender("xlstm", inline=True),
}
GRAPHS = {  # with CUDA graphs
    "inductor, graphs": Contender("inductor", "reduce-overhead"),
    "xlstm, graphs": Contender("xlstm", "reduce-overhead"),
}


def build(args: argparse.Namespace) -> Any:
    """Return a model with random weights."""
    from transformers import xLSTMConfig, xLSTMForCausalLM

    kernels = {} if args.kernel == "native" else {
        "chunkwise_kernel": f"chunkwise--triton_{args.kernel}", "sequence_kernel": "native_sequence__triton",
        "step_kernel": "triton",
    }
    torch.manual_seed(0)
    config = xLSTMConfig(
        vocab_size=args.vocabulary, hidden_size=args.hidden, embedding_dim=args.hidden, num_hidden_layers=args.layers,
        num_blocks=args.layers, num_heads=args.heads, pad_token_id=0, bos_token_id=0, eos_token_id=None,
        max_inference_chunksize=args.prompt, **kernels,
    )
    with torch.device(args.device):
        return xLSTMForCausalLM(config).to(getattr(torch, args.dtype)).eval()


class Runner:
    """A contender: its call of the model, and its cache."""

    def __init__(self, model: Any, contender: Contender, ids: Tensor) -> None:
        self.ids, self.contender = ids, contender
        self.cache: Any = None
        self.seconds: dict[str, float] = {}  # of the first calls
        self.run = model
        if contender.backend is not None:
            how: dict[str, Any] = {"mode": contender.mode}
            if contender.inline is not None:
                how = {"options": {"inline": contender.inline}}
            self.run = torch.compile(model, backend=contender.backend, dynamic=False, **how)

    def prefill(self) -> Tensor:
        """Read the prompt into a new cache; return the last token's logits."""
        self._begin()
        return self._last(adapter.forward(self.run, self.ids))

    def fill(self, eager: Any) -> None:
        """Fill the cache by the eager model, at fixed addresses."""
        self.cache = adapter.forward(eager, self.ids).cache
        if self.contender.backend == "inductor" and self.contender.mode is not None:
            for t in adapter.tensors(self.cache):
                torch._dynamo.mark_static_address(t)  # needed for CUDA graphs; the backend xlstm does so itself

    def decode(self) -> Tensor:
        """Advance the cache by a token; return its logits."""
        self._begin()
        return self._last(adapter.forward(self.run, self.ids[:, -1:], self.cache))

    def first(self, phase: str) -> Tensor:
        """Run a phase's first call with an empty Inductor cache, and store its seconds."""
        from torch._inductor.utils import fresh_cache

        found: list[Tensor] = []
        with fresh_cache():
            taken = timed(lambda: found.append(getattr(self, phase)()), self.ids.device)
        self.seconds[phase] = round(taken / 1e3, 2)
        return found[0]

    def _begin(self) -> None:
        if self.contender.mode is not None:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]

    def _last(self, out: adapter.Output) -> Tensor:
        return out.logits[:, -1].clone()


@torch.no_grad()
def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return medians and ratios; raise SystemExit if a contender's logits differ from the eager model's."""
    torch._dynamo.config.recompile_limit = 64  # contenders share the model's code
    model = build(args)
    patched = copy.deepcopy(model)
    patch(patched)
    ids = torch.randint(args.vocabulary, (args.batch, args.prompt), generator=torch.Generator().manual_seed(0))
    ids = ids.to(args.device)
    contenders = EAGER | COMPILED | (GRAPHS if args.device == "cuda" else {})
    runners = {
        name: Runner(patched if contender.patched else model, contender, ids)
        for name, contender in contenders.items() if name not in args.without
    }
    result: dict[str, Any] = {
        "model": {key: getattr(args, key) for key in (*PRESETS["small"], "batch", "kernel")},
        "machine": machine(ids.device, "transformers"),
    }
    for phase in args.phases:
        result[phase] = _phase(phase, runners, model, ids.device, args.seconds)
        print(json.dumps({phase: result[phase]}, indent=1), flush=True)
    if args.device == "cuda":
        result["share_of_operators"] = {
            phase: _share(getattr(runners["xlstm"], phase), ids.device) for phase in args.phases if "xlstm" in runners
        }
    return result


def _phase(
    phase: str, runners: Mapping[str, Runner], model: Any, device: torch.device, seconds: float
) -> dict[str, Any]:
    """Compare every contender with the eager model, then time them in turns."""
    differences: dict[str, float] = {}
    wanted: Tensor | None = None
    for name, runner in runners.items():
        if phase == "decode":
            runner.fill(model)
        found = runner.first(phase).float()
        wanted = found if wanted is None else wanted
        differences[name] = (found - wanted).abs().max().item()
    tolerance = TOLERANCE[model.dtype]
    if not max(differences.values()) <= tolerance:
        raise SystemExit(f"logits of {phase} must agree to {tolerance}, got differences {differences}")
    for runner in runners.values():  # warm up, and record CUDA graphs
        for _ in range(3):
            getattr(runner, phase)()
    calls: dict[str, Callable[[], Any]] = {name: getattr(runner, phase) for name, runner in runners.items()}
    tokens = next(iter(runners.values())).ids.shape[1] if phase == "prefill" else 1
    calls["linear"] = _linears(model, tokens, device)
    medians = alternate(calls, device, seconds)
    first = {name: runner.seconds[phase] for name, runner in runners.items() if runner.contender.backend is not None}
    ratios = {
        f"{one} / {other}": round(medians[one] / medians[other], 3)
        for one in runners if one.startswith("xlstm") for other in runners if not other.startswith("xlstm")
    }
    return {"ms": medians, "tokens_per_s": {name: round(1e3 * tokens / ms, 1) for name, ms in medians.items()},
            "ratio": ratios, "first_call_s": first, "difference": differences}


def _linears(model: Any, tokens: int, device: torch.device) -> Callable[[], None]:
    """Return a call of only the model's Linear layers for `tokens` tokens, a lower bound for every backend."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    inputs = {
        width: torch.randn(1, tokens, width, device=device, dtype=model.dtype)
        for width in {layer.in_features for layer in layers}
    }

    def run() -> None:
        for layer in layers:
            layer(inputs[layer.in_features])

    return run


def _share(call: Callable[[], Any], device: torch.device) -> float:
    """Return the share of a call's device time that our operators take, by torch's profiler; spliced ones not counted.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        timed(call, device)
    events = trace.key_averages()
    whole = sum(event.self_device_time_total for event in events)
    ours = sum(event.device_time_total for event in events if event.key.startswith("xlstm::"))
    return round(ours / whole, 3) if whole else 0.0


def flags(doc: str | None, presets: Mapping[str, Mapping[str, Any]]) -> argparse.ArgumentParser:
    """Return a parser with what `build` reads, the device, the time, and where to write the result."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", choices=list(presets), default="small", help="sizes, each with a flag too (default %(default)s)")
    for name, value in presets["small"].items():
        add(f"--{name}", type=type(value))
    add("--device", choices=["cpu", "cuda", "mps"], default="cpu", help="(default %(default)s)")
    add("--batch", type=int, default=1, help="sequences at once (default %(default)s)")
    add("--kernel", choices=["native", "xl_chunk", "limit_chunk"], default="native",
        help="what the model itself runs; others than native are Triton's and need xlstm (default %(default)s)")
    add("--without", nargs="*", default=[], help="contenders to leave out")
    add("--seconds", type=float, default=30.0, help="that contenders take turns for (default %(default)s)")
    add("--json", type=Path, help="file to write the result to")
    return parser


def read(
    parser: argparse.ArgumentParser, presets: Mapping[str, Mapping[str, Any]], arguments: Sequence[str] | None
) -> argparse.Namespace:
    """Return the arguments, with the preset's sizes where none are given."""
    args = parser.parse_args(arguments)
    for name, value in presets[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    parser = flags(__doc__, PRESETS)
    parser.add_argument("--phases", nargs="+", choices=["prefill", "decode"], default=["prefill", "decode"])
    args = read(parser, PRESETS, arguments)
    result = measure(args)
    print(json.dumps(result, indent=1))
    save(result, args.json)


if __name__ == "__main__":
    main()
