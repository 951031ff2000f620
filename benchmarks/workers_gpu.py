"""Time one long prompt on one GPU against Ray workers with a GPU each, and hold logits and states to one process.

    python -m benchmarks.workers_gpu --json result.json            # all GPUs of this host

The model has the layers of xLSTM-7B (8 heads of 256 by 512, width 4,096, feed-forward 10,944) and random weights.
Contenders take turns prompt by prompt: one process, and workers whose states go from device to device or through the
host. Then a worker is killed in a prompt, which must come out the same; and two workers share one GPU, one of which
runs out of memory in a prompt and reads the next. What does not fit in `--seconds` is left out, and told.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.parallel_model import Costs, seconds_on_gpus
from benchmarks.timing import machine, save
from torch_xlstm_ops import mlstm_chunkwise
from torch_xlstm_ops.models import transformers as adapter
from torch_xlstm_ops.parallel import Report, Workers
from torch_xlstm_ops.patch import patch

WAYS = ("device", "host")
TOLERANCE = 0.03  # relative, of bfloat16 logits and states


def build(args: argparse.Namespace) -> Any:
    """Return the model, on the first GPU."""
    from transformers import xLSTMConfig, xLSTMForCausalLM

    torch.manual_seed(0)
    settings = xLSTMConfig(
        vocab_size=256, hidden_size=args.width * args.heads, num_hidden_layers=args.layers, num_blocks=args.layers,
        num_heads=args.heads, qk_dim_factor=0.5, mode="inference", return_last_states=True,
        max_inference_chunksize=1 << 30, pad_token_id=0, bos_token_id=0, eos_token_id=None,
    )
    with torch.device(args.device):
        model = xLSTMForCausalLM(settings).to(getattr(torch, args.dtype)).eval()
    adapter.last_position_only(model)
    return model


def error(found: Tensor, wanted: Tensor) -> float:
    """Return the relative error."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def compare(found: Any, logits: Tensor, states: Sequence[Sequence[Tensor]]) -> dict[str, float]:
    """Return the relative errors of the logits and of the worst layer's states c and n, times exp(m)."""
    errors = {"logits": error(found.logits, logits), "c": 0.0, "n": 0.0, "m": 0.0}
    for ours, theirs in zip(adapter.layers(found.cache), states, strict=True):
        scale = torch.exp(ours[2].double() - theirs[2].double())
        errors["c"] = max(errors["c"], error(ours[0].double() * scale[..., None], theirs[0]))
        errors["n"] = max(errors["n"], error(ours[1].double() * scale, theirs[1]))
        errors["m"] = max(errors["m"], float((ours[2] - theirs[2]).abs().max()))
    return errors


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds of a call, and its result."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    found = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began, found


def by(workers: Workers, way: str, ids: Tensor, count: int) -> Any:
    """Read a prompt with so many workers whose states travel in one way."""
    workers._actors.travel(way)
    return workers.prefill(ids, [1.0] * count)


def told(report: Report) -> dict[str, Any]:
    """Return a report as plain data."""
    return {
        "way": report.way, "hop_ms": None if report.hop_seconds is None else report.hop_seconds * 1e3,
        "bytes": report.bytes_per_layer, "seconds": [read.seconds for read in report.reads],
        "waited": [read.waited for read in report.reads], "speeds": report.speeds,
        "hops_ms": [[hop * 1e3 for hop in read.hops] for read in report.reads],
    }


class Run:
    """One run of the benchmark: its model, its results so far, and the time that is left."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.count = args, args.workers or torch.cuda.device_count()
        self.model = build(args)
        self.ends = time.monotonic() + args.seconds
        self.ways = WAYS if args.device == "cuda" else ("host",)
        self.result: dict[str, Any] = {
            "machine": machine(torch.device(args.device), "ray", "transformers"), "gpus": torch.cuda.device_count(),
            "shape": {"layers": args.layers, "heads": args.heads, "dtype": args.dtype}, "rows": [], "left out": [],
        }

    def phase(self, name: str, wanted: float, work: Callable[[], dict[str, Any]]) -> None:
        """Do a part of the run if so many seconds are left, and save its result."""
        if time.monotonic() + wanted > self.ends:
            self.result["left out"].append(name)
        else:
            self.result["rows"].append({"phase": name, **work()})
            print(name, self.result["rows"][-1], flush=True)
        save(self.result, self.args.json)

    def one_process(self, S: int) -> tuple[Tensor, Tensor, list[list[Tensor]]]:
        """Return a prompt, and the logits and states of one process."""
        ids = torch.randint(0, 256, (1, S), generator=torch.Generator().manual_seed(S))
        out = adapter.forward(self.model, ids.to(self.args.device))
        return ids, out.logits[:, -1], [[t.clone() for t in layer] for layer in adapter.layers(out.cache)]

    def try_device(self, workers: Workers) -> None:
        """Leave the way from device to device out if there is none."""
        if self.args.device != "cuda":
            return
        workers._actors.travel("device")
        try:
            workers._actors.connect()
        except RuntimeError as failed:
            self.ways = ("host",)
            self.result["device"] = str(failed)

    def speed(self, workers: Workers, S: int) -> dict[str, Any]:
        """Time a prompt by each contender in turn."""
        ids, logits, states = self.one_process(S)
        here = ids.to(self.args.device)
        calls: dict[str, Callable[[], Any]] = {"one process": lambda: adapter.forward(self.model, here)}
        for way in self.ways:
            for n in sorted({1, self.count} if self.args.alone >= S else {self.count}):
                calls[f"{n} {way}"] = lambda way=way, n=n: by(workers, way, ids, n)  # type: ignore[misc]
        taken: dict[str, list[float]] = {name: [] for name in calls}
        errors, reports = {}, {}
        for name in list(calls)[1:]:
            found = calls[name]()
            errors[name] = compare(found, logits, states)
        for _ in range(self.args.rounds):
            for name, call in calls.items():
                spent, found = timed(call)
                taken[name].append(spent)
                if name != "one process":
                    reports[name] = told(found.report)
                del found
        medians = {name: statistics.median(times) for name, times in taken.items()}
        cell = self.cell(min(S, 16_384)) * 1e6
        return {"tokens": S, "cell_us": cell, "seconds": medians, "all seconds": taken, "errors": errors,
                "reports": reports,
                "speedup": {name: medians["one process"] / s for name, s in medians.items()}}

    def killed(self, workers: Workers, S: int, after: float) -> dict[str, Any]:
        """Kill the first worker in mid-prompt."""
        ids, logits, states = self.one_process(S)
        pid = workers.pids()[0]
        workers._actors.travel(self.ways[0])
        workers._actors.connect()
        timer = threading.Timer(after, lambda: os.kill(pid, signal.SIGKILL))
        timer.start()
        spent, found = timed(lambda: workers.prefill(ids, [1.0] * self.count))
        timer.join()
        again = workers.prefill(ids, [1.0] * self.count)
        return {"tokens": S, "seconds": spent, "replays": found.report.replays, "way after": again.report.way,
                "errors": compare(found, logits, states), "errors after": compare(again, logits, states)}

    def halves(self, S: int) -> dict[str, Any]:
        """Have two workers share one GPU; one runs out of memory, and reads the next prompt."""
        row: dict[str, Any] = {"tokens": S}
        ids, logits, states = self.one_process(S)
        if self.args.device == "cuda":
            torch.cuda.empty_cache()
        with Workers(self.model, 2, gpus=0.5, placement="pack") as workers:
            found = workers.prefill(ids, [1.0, 1.0])
            row |= {"errors": compare(found, logits, states), "report": told(found.report)}
            if self.args.memory:
                try:
                    workers.prefill(torch.zeros(1, self.args.memory, dtype=torch.long), [1.0, 1.0])
                    row["out of memory"] = "no"
                except RuntimeError as failed:
                    row["out of memory"] = str(failed)[:300]
                row["errors after"] = compare(workers.prefill(ids, [1.0, 1.0]), logits, states)
        return row

    def cell(self, S: int) -> float:
        """Return the seconds of a token in an mLSTM."""
        heads, args = self.args.heads, self.args
        dtype = getattr(torch, args.dtype)
        q, k = torch.randn(2, 1, heads, S, args.width // 2, device=args.device, dtype=dtype)
        v = torch.randn(1, heads, S, args.width, device=args.device, dtype=dtype)
        igate, fgate = torch.randn(2, 1, heads, S, device=args.device, dtype=dtype)
        times = [timed(lambda: mlstm_chunkwise(q, k, v, igate, fgate + 3))[0] for _ in range(6)]
        return statistics.median(times[1:]) / S

    def predict(self) -> dict[str, Any]:
        """Return what the model says from one process, a token's mLSTM, and hops, beside what was measured."""
        found = {}
        rows = [row for row in self.result["rows"] if row["phase"] == "speed"]
        alone = min(rows, key=lambda row: row["tokens"])["seconds"]
        for row in rows:
            for way in self.ways:
                reports, cell = row["reports"], row["cell_us"] / 1e6
                hop = (reports[f"{self.count} {way}"]["hop_ms"] or 0.0) / 1e3
                result = alone[f"1 {way}"] - alone["one process"]
                rest = row["seconds"]["one process"] / self.args.layers / row["tokens"] - cell
                costs = Costs(rest, cell, cell / 3, hop)
                said = seconds_on_gpus(costs, row["tokens"], self.count, self.args.layers, result)
                found[f"{row['tokens']} {way}"] = {
                    "predicted": said, "measured": row["seconds"][f"{self.count} {way}"],
                    "measured to predicted": row["seconds"][f"{self.count} {way}"] / said, "costs": costs._asdict(),
                    "result": result,
                }
        return found

    def all(self) -> None:
        """Do all parts."""
        args = self.args
        with patch("transformers"), torch.inference_mode():
            with Workers(self.model, self.count) as workers:
                print("workers started", flush=True)
                self.try_device(workers)
                for S in args.tokens:
                    self.phase("speed", 3, lambda S=S: self.speed(workers, S))  # type: ignore[misc]
                self.phase("prediction", 5, self.predict)
                if args.kill:
                    self.phase("killed", 30, lambda: self.killed(workers, args.tokens[-1], args.kill))
            if args.halves:
                self.phase("halves", 25, lambda: self.halves(args.tokens[0]))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--tokens", type=int, nargs="+", default=[16_384, 65_536, 262_144], help="prompts (default %(default)s)")
    add("--workers", type=int, help="default one a GPU")
    add("--layers", type=int, default=8)
    add("--heads", type=int, default=8)
    add("--width", type=int, default=512, help="of a head")
    add("--dtype", default="bfloat16")
    add("--device", default="cuda")
    add("--rounds", type=int, default=5, help="turns of each contender")
    add("--kill", type=float, help="kill a worker so many seconds after a prompt's start")
    add("--halves", action="store_true", help="have two workers share one GPU")
    add("--memory", type=int, help="tokens that do not fit in half a GPU")
    add("--alone", type=int, default=65_536, help="longest prompt that one worker reads too")
    add("--seconds", type=float, default=3600, help="time for all")
    add("--json", type=Path, help="where to write the result")
    logging.basicConfig(level=logging.INFO)
    run = Run(parser.parse_args(arguments))
    run.all()
    print(run.result)
    errors = [value for row in run.result["rows"] for group in row.get("errors", {}).values()
              for value in (group.values() if isinstance(group, dict) else [group])]
    if max(errors, default=0.0) > TOLERANCE:
        raise SystemExit(f"the results of workers are wrong: {max(errors)}")


if __name__ == "__main__":
    main()
