"""Train the small models of the recall benchmark: on one CPU core, in minutes, from a fixed seed.

    W=benchmarks/quality/weights
    MORE="--first 512 --pairs 512 --least 512 --stage-steps 0 --lr 2e-3"
    python -m benchmarks.train_mqar mlstm
    python -m benchmarks.train_mqar mlstm --start $W/mqar_mlstm.safetensors $MORE --last-steps 300
    python -m benchmarks.train_mqar slstm
    python -m benchmarks.train_mqar slstm --start $W/mqar_slstm.safetensors $MORE --last-steps 200

One is an mLSTM block with short convolutions before q and k, which is how a key meets the value that follows it; in the
other an sLSTM stands in the place of the convolutions. Rows begin with few pairs, and hold twice as many each time the
answers are right; at the end the rate falls, and the number of pairs is drawn. The second command of each goes on with
rows of 512. The gradients are those of our own operators. What is written is in bfloat16, and the same on every run on
one kind of machine.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.mqar import load
from benchmarks.quality.recall import Recall, Size, draw, loss_and_accuracy
from benchmarks.timing import machine

SIZES = {"mlstm": Size(), "slstm": Size(conv=0, slstm_heads=4)}
WEIGHTS = Path(__file__).parent / "quality" / "weights"
LIMIT = 4 * 2**20  # bytes that a file of weights may take


def stages(args: argparse.Namespace) -> list[int]:
    """Return the numbers of pairs, doubling up to all."""
    return [args.pairs >> shift for shift in range(int(math.log2(args.pairs / args.first)), -1, -1)]


def one_step(model: Recall, adam: torch.optim.Optimizer, rows: Any, device: str) -> tuple[float, float]:
    """Train on one batch; return its loss and accuracy."""
    ids, answers = rows.ids.to(device), rows.answers.to(device)
    logits, _ = model(ids, last=answers.shape[1])
    loss, accuracy = loss_and_accuracy(logits, answers)
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    adam.step()
    adam.zero_grad(set_to_none=True)
    return loss.item(), accuracy.item()


def train(model: Recall, args: argparse.Namespace) -> list[dict[str, float]]:
    """Train in stages, then with a decaying rate on the last one; return the curve."""
    generator = torch.Generator().manual_seed(args.seed)
    adam = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0)
    curve: list[dict[str, float]] = []
    started, step = time.perf_counter(), 0

    def learn(P: int, rate: float) -> float:
        nonlocal step
        for group in adam.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 100)
        B = max(1, args.tokens // (3 * P))
        loss, accuracy = one_step(model, adam, draw(model.size, B, P, generator), args.device)
        step += 1
        if not math.isfinite(loss):
            raise SystemExit(f"the loss is {loss} at step {step}: try a lower --lr")
        if step % args.every == 0:
            curve.append({"seconds": round(time.perf_counter() - started, 1), "step": step, "pairs": P,
                          "loss": round(loss, 4), "accuracy": round(accuracy, 4)})
            print(json.dumps(curve[-1]), flush=True)
        return accuracy

    for P in stages(args):
        right = 0.0
        for _ in range(args.stage_steps):
            right = 0.9 * right + 0.1 * learn(P, args.lr)
            if right > args.enough:
                break
    for index in range(args.last_steps):
        least = args.least or args.pairs / 4
        P = int(2 ** (math.log2(least) + math.log2(args.pairs / least) * torch.rand((), generator=generator).item()))
        learn(P, args.lr * (0.5 + 0.5 * math.cos(math.pi * index / args.last_steps)))
    return curve


def save(model: Recall, curve: Sequence[dict[str, float]], args: argparse.Namespace) -> None:
    """Write the weights in bfloat16, and a file with the sizes and the training settings."""
    from safetensors.torch import save_file

    weights: dict[str, Tensor] = {n: t.detach().cpu().to(torch.bfloat16) for n, t in model.state_dict().items()}
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"mqar_{args.model}.safetensors"
    save_file(weights, file, metadata={"size": json.dumps(model.size._asdict())})
    file.chmod(0o644)
    before = None if args.start is None else json.loads(args.start.with_suffix(".json").read_text(encoding="utf-8"))
    report = {
        "parameters": sum(t.numel() for t in weights.values()), "bytes": file.stat().st_size,
        "arguments": {n: str(a) for n, a in vars(args).items() if n not in ("out", "start")},
        "machine": machine(torch.device(args.device)), "curve": curve, "before": before,
    }
    file.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"{file.name}: {file.stat().st_size:,} bytes", flush=True)
    if file.stat().st_size > LIMIT:
        raise SystemExit(f"{file} must take at most {LIMIT:,} bytes: use a smaller model")


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    torch.manual_seed(args.seed)
    model = Recall(SIZES[args.model]) if args.start is None else load(args.start).train()
    model = model.to(args.device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    save(model, train(model, args), args)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", choices=SIZES, help="which of the two")
    add("--pairs", type=int, default=256, help="most pairs in a row (default %(default)s)")
    add("--first", type=int, default=8, help="pairs in a row at first (default %(default)s)")
    add("--tokens", type=int, default=6144, help="tokens a step (default %(default)s)")
    add("--enough", type=float, default=0.97, help="share of right answers that ends a stage (default %(default)s)")
    add("--stage-steps", type=int, default=1000, help="steps of a stage at most (default %(default)s)")
    add("--least", type=int, help="fewest pairs in a row at the falling rate (default: a quarter of --pairs)")
    add("--start", type=Path, help="trained weights to go on from (default: none)")
    add("--last-steps", type=int, default=600, help="steps at a falling rate (default %(default)s)")
    add("--lr", type=float, default=3e-3, help="peak learning rate (default %(default)s)")
    add("--every", type=int, default=20, help="steps between points of the curve (default %(default)s)")
    add("--seed", type=int, default=0, help="of weights and rows (default %(default)s)")
    add("--device", default="cpu", help="(default %(default)s)")
    add("--out", type=Path, default=WEIGHTS, help="directory to write (default: benchmarks/quality/weights)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
