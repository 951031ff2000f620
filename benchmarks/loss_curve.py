"""Train the embedded model's shape from its first weights with and without our drop-in, and compare the losses.

    python -m benchmarks.loss_curve --steps 200 --json result.json

Both ways begin with the same weights, and read the same windows of the Python standard library in the same order, with
states carried from window to window. On the CPU they compute in float32, elsewhere under autocast in bfloat16.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from benchmarks import train_demo_model as demo
from benchmarks.timing import machine, save
from torch_xlstm_ops.patch import patch

WAYS: dict[str, Callable[[], Any]] = {"transformers": nullcontext, "patched": lambda: patch("transformers")}


def train(settings: argparse.Namespace, sources: Sequence[demo.Source], steps: int) -> list[float]:
    """Return the loss of each step, in bits a byte."""
    model = demo.build(settings).train()
    adam, states = demo.optimizer(model, settings), demo.zero_states(model, settings.batch)
    losses = []
    for step, (inputs, targets) in enumerate(itertools.islice(demo.windows(sources, settings), steps)):
        for group in adam.param_groups:
            group["lr"] = settings.lr * min(1.0, (step + 1) / settings.warmup)
        with demo.autocast(settings.device):
            x, states = demo.advance(model, demo.call, inputs, states)
            loss = demo.nats(model, x, targets).mean()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    return [round(value, 7) for value in (torch.stack(losses) / math.log(2)).tolist()]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return the losses and seconds of both ways, and the largest difference of two losses of one step."""
    settings = demo.parse(["--device", args.device, "--batch", str(args.batch), "--length", str(args.length),
                           "--warmup", "20", "--lr", "1e-3", "--dropout", "0"])
    sources = demo.standard_library()["train"]
    losses, seconds = {}, {}
    for name, way in WAYS.items():
        with way():
            start = time.perf_counter()
            losses[name] = train(settings, sources, args.steps)
            seconds[name] = round(time.perf_counter() - start, 1)
        print(f"{name}: {losses[name][0]} to {losses[name][-1]} bits a byte, {seconds[name]} s", flush=True)
    device = torch.device(args.device)
    return {
        "model": {"batch": args.batch, "length": args.length, "steps": args.steps},
        "machine": machine(device, "transformers"), "losses": losses, "seconds": seconds,
        "difference": max(abs(a - b) for a, b in zip(*losses.values(), strict=True)),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--steps", type=int, default=200, help="training steps (default %(default)s)")
    add("--batch", type=int, default=4, help="windows a step (default %(default)s)")
    add("--length", type=int, default=256, help="tokens a window (default %(default)s)")
    add("--device", choices=["cpu", "cuda", "mps"], default="cpu", help="(default %(default)s)")
    add("--json", type=Path, help="file to write the result to")
    args = parser.parse_args(arguments)
    result = measure(args)
    print(json.dumps({key: value for key, value in result.items() if key != "losses"}, indent=1))
    save(result, args.json)


if __name__ == "__main__":
    main()
