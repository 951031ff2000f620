"""Time a transformers xLSTM with and without our drop-in: one prompt, and decoding after it.

    python -m benchmarks.transformers_model --json result.json

The two take turns in one process, call by call, so that other load of the machine affects both.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import machine, save, timed
from torch_xlstm_ops.models import transformers as adapter
from torch_xlstm_ops.patch import patch

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25}  # of logits that are capped at 30
CONTENDERS: dict[str, Callable[[], Any]] = {"transformers": nullcontext, "patched": lambda: patch("transformers")}


def build(args: argparse.Namespace) -> Any:
    """Return a model with random weights."""
    from transformers import xLSTMConfig, xLSTMForCausalLM

    torch.manual_seed(0)
    config = xLSTMConfig(
        vocab_size=256, hidden_size=args.hidden, num_hidden_layers=args.layers, num_heads=args.heads,
        pad_token_id=0, bos_token_id=0, eos_token_id=None,
    )
    return xLSTMForCausalLM(config).to(args.device, getattr(torch, args.dtype)).eval()


def one_round(model: Any, ids: Tensor, tokens: int) -> tuple[float, list[float], Tensor]:
    """Prefill `ids` and decode; return the milliseconds of the prefill and of each step, and all logits."""
    results: list[adapter.Output] = []
    prefill = timed(lambda: results.append(adapter.forward(model, ids)), ids.device)
    cache = results[0].cache
    steps = [
        timed(lambda: results.append(adapter.forward(model, ids[:, -1:], cache)), ids.device)
        for _ in range(tokens)
    ]
    return prefill, steps, torch.cat([out.logits for out in results], 1)


@torch.no_grad()
def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return medians and ratios; raise SystemExit if the two differ."""
    model = build(args)
    ids = torch.randint(256, (args.batch, args.prompt), generator=torch.Generator().manual_seed(0)).to(args.device)
    agreed = {}
    for name, active in CONTENDERS.items():  # correctness, and the warm-up
        with active():
            for _ in range(2):
                agreed[name] = one_round(model, ids, args.tokens)[2]
    difference = (agreed["patched"] - agreed["transformers"]).abs().max().item()
    if not difference <= TOLERANCE[model.dtype]:
        raise SystemExit(f"logits must agree to {TOLERANCE[model.dtype]}, got a difference of {difference}")
    prefill: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    decode: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _ in range(args.rounds):
        for name, active in CONTENDERS.items():
            with active():
                one_round(model, ids, 2)  # exclude the cost of switching
                first, steps, _ = one_round(model, ids, args.tokens)
            prefill[name].append(first)
            decode[name] += steps
    medians = {
        phase: {name: round(statistics.median(times), 3) for name, times in by_name.items()}
        for phase, by_name in (("prefill_ms", prefill), ("decode_ms", decode))
    }
    return {
        "model": {key: getattr(args, key) for key in ("hidden", "layers", "heads", "dtype", "batch", "prompt")},
        "machine": machine(ids.device, "transformers"), "difference": difference, **medians,
        "ratio": {
            phase.removesuffix("_ms"): round(of["patched"] / of["transformers"], 3) for phase, of in medians.items()
        },
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--hidden", type=int, default=512, help="width (default %(default)s)")
    add("--layers", type=int, default=8, help="blocks (default %(default)s)")
    add("--heads", type=int, default=4, help="heads (default %(default)s)")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights (default %(default)s)")
    add("--device", choices=["cpu", "cuda", "mps"], default="cpu", help="(default %(default)s)")
    add("--batch", type=int, default=1, help="prompts at once (default %(default)s)")
    add("--prompt", type=int, default=63, help="tokens of the prompt (default %(default)s)")
    add("--tokens", type=int, default=16, help="tokens to decode (default %(default)s)")
    add("--rounds", type=int, default=10, help="turns of each contender (default %(default)s)")
    add("--json", type=Path, help="file to write the result to")
    args = parser.parse_args(arguments)
    result = measure(args)
    print(json.dumps(result, indent=1))
    save(result, args.json)


if __name__ == "__main__":
    main()
