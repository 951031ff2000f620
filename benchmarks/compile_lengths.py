"""How long a compiled model waits at the first prompt of each length: the backend `xlstm`, and Inductor alone.

    python -m benchmarks.compile_lengths --json result.json

Each contender compiles in a process of its own, with an empty Inductor cache, and meets the lengths in order. A wait is
the first call's time less the median of three later ones. The logits are compared with the eager model's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import compiled_model
from benchmarks.timing import machine, save, timed
from torch_xlstm_ops.models import transformers as adapter

LENGTHS = (512, 1024, 777, 2048)
CONTENDERS = ("xlstm", "inductor")
LATER = 3


@torch.no_grad()
def waits(backend: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return for each length the wait in seconds, and the milliseconds of a later call; with an empty cache."""
    from torch._inductor.utils import fresh_cache

    model = compiled_model.build(args)
    run = torch.compile(model, backend=backend)
    found = []
    with fresh_cache():
        for length in args.lengths:
            ids = torch.randint(args.vocabulary, (1, length), generator=torch.Generator().manual_seed(0))
            found.append(_wait(model, run, ids.to(args.device)))
    return found


def _wait(model: Any, run: Any, ids: Tensor) -> dict[str, Any]:
    """Time the first call and later ones; raise SystemExit if the logits differ from the eager model's."""
    logits: list[Tensor] = []
    first, *later = [timed(lambda: logits.append(adapter.forward(run, ids).logits), ids.device)
                     for _ in range(1 + LATER)]
    error = float((logits[-1] - adapter.forward(model, ids).logits).abs().max())
    if error > compiled_model.TOLERANCE[logits[-1].dtype]:
        raise SystemExit(f"logits of {ids.shape[1]} tokens are {error:.1e} from the eager model's")
    median = statistics.median(later)
    return {"tokens": ids.shape[1], "wait_s": round((first - median) / 1e3, 2), "ms": round(median, 3)}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return the waits of every contender."""
    cases = {}
    for backend in CONTENDERS:
        with tempfile.TemporaryDirectory() as room:
            file = Path(room, "found.json")
            command = [sys.executable, "-m", "benchmarks.compile_lengths", "--only", backend, "--json", str(file),
                       "--device", args.device, "--hidden", str(args.hidden), "--layers", str(args.layers),
                       "--lengths", *map(str, args.lengths)]
            subprocess.run(command, check=True, cwd=Path(__file__).parent.parent)
            cases[backend] = json.loads(file.read_text())["cases"]
    about = {"hidden": args.hidden, "layers": args.layers, "dtype": args.dtype}
    return {"machine": machine(torch.device(args.device), "transformers"), "model": about, "cases": cases}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="of the prompts, in this order")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--only", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.set_defaults(heads=4, vocabulary=256, dtype="float32", kernel="native")
    args = parser.parse_args(arguments)
    args.prompt = max(args.lengths)  # longer ones run in pieces of so many tokens
    found = measure(args) if args.only is None else {"cases": waits(args.only, args)}
    print(json.dumps(found, indent=1))
    save(found, args.json)


if __name__ == "__main__":
    main()
