"""Predict the time of several workers for a prompt, compare it with measurements, and extrapolate to a cluster.

    python -m benchmarks.parallel_model --json result.json      # one process against 1 to 3 workers, one thread each
    python -m benchmarks.parallel_model --paper                 # no measurement: xLSTM-7B on 2 to 1,024 workers

The prediction adds up what each worker does, layer by layer, and when the state of the worker before arrives. It knows
a token's cost in an mLSTM, in a summary and in the rest of a layer, and that of handing a state on, all measured.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.timing import machine, save
from torch_xlstm_ops import mlstm_chunkwise
from torch_xlstm_ops.models import transformers as adapter
from torch_xlstm_ops.ops.mlstm import sequence
from torch_xlstm_ops.parallel import Workers, scan, shards
from torch_xlstm_ops.parallel.state_directory import StateDirectory
from torch_xlstm_ops.parallel.state_link import StateLink
from torch_xlstm_ops.patch import patch

CPU = torch.device("cpu")
# xLSTM-7B: 32 layers, 6.5 G parameters in them, states of 8 heads (256, 512). An mLSTM took 3.98 ms for 65,536 tokens
# on an H100 (README), a summary is a third of it; the rest is taken to run at 400 TFLOP/s.
LAYERS_7B, PARAMETERS_7B, STATE_7B = 32, 6.5e9, 8 * (256 * 512 + 256 + 1) * 4
CELL_7B, FLOPS = 3.98e-3 / 65_536, 400e12
# Seconds of a hop. "host" was measured: median wait of workers that had little else to wait for, 4 H200 of one host,
# 16,384 tokens, states by pageable memory and Ray's store. The others are assumed: such a latency and the bytes over a
# link, and memory of another GPU that is announced through Ray.
HOP_HOST = 2.1e-3
HOPS = {"host": HOP_HOST, "100 Gb/s (assumed)": HOP_HOST + STATE_7B * 8 / 100e9, "device (assumed)": 5e-4}
PROMPTS = (32_768, 1_000_000, 10_000_000, 100_000_000)
WORKERS = (1, 2, 4, 8, 16, 64, 256, 1024)


class Costs(NamedTuple):
    """Seconds: of a token in a layer, and of a hop."""

    rest: float  # projections, norms, feed-forward
    cell: float  # the mLSTM
    summary: float  # a summary
    hop: float  # from one worker to the next


def simulate(costs: Costs, tokens: Sequence[int], layers: int, summarize_first: bool) -> float:
    """Return the seconds until the last of the workers, which read so many tokens each, has passed all layers."""
    done = [0.0] * len(tokens)
    for _ in range(layers):
        sent = 0.0
        for worker, count in enumerate(tokens):
            ready = done[worker] + count * costs.rest
            if worker == 0:
                done[worker] = sent = ready + count * costs.cell
            elif summarize_first and worker < len(tokens) - 1:
                sent = max(ready + count * costs.summary, sent + costs.hop)
                done[worker] = sent + count * costs.cell
            else:
                done[worker] = sent = max(ready, sent + costs.hop) + count * costs.cell
    return max(done)


def seconds(costs: Costs, tokens: int, workers: int, layers: int) -> float:
    """Return what `simulate` says of equal shards, with or without summaries as `Workers` would choose."""
    cuts = shards.split(tokens, [1.0] * workers)
    return simulate(costs, [cut.stop - cut.start for cut in cuts], layers, shards.summarize_first(workers, layers))


def seconds_on_gpus(costs: Costs, tokens: int, workers: int, layers: int, result: float) -> float:
    """Return the seconds of workers, and of handing logits and cache to the caller."""
    return seconds(costs, tokens, workers, layers) + result


def tree_seconds(costs: Costs, tokens: int, workers: int, layers: int) -> float:
    """Return the seconds of workers whose sums go up and down a tree in each layer; all pass a layer together."""
    up, down = scan.rounds(workers)
    count = -(-tokens // workers)
    hops = costs.hop * (len(up) + len(down))
    return layers * (count * (costs.rest + costs.summary + costs.cell) + hops)


def crossover(costs: Costs, tokens: int, layers: int) -> int | None:
    """Return the power of two of workers from which on, up to 1,024, the tree beats the chain; None if none."""
    found = None
    for workers in (2**power for power in range(10, 0, -1)):
        if tree_seconds(costs, tokens, workers, layers) >= seconds(costs, tokens, workers, layers):
            break
        found = workers
    return found


def costs_7b(hop: float) -> Costs:
    """Return the costs of xLSTM-7B, with a hop of so many seconds."""
    return Costs(2 * PARAMETERS_7B / LAYERS_7B / FLOPS, CELL_7B, CELL_7B / 3, hop)


def paper() -> list[dict[str, Any]]:
    """Print and return the prediction for xLSTM-7B: a chain through the host, and the tree, by number of workers."""
    rows = []
    print(f"{'tokens':>11} {'workers':>7} " + "".join(f"{name:>26}" for name in HOPS) + "   speedup of chain, tree")
    for tokens in PROMPTS:
        for workers in WORKERS:
            row: dict[str, Any] = {"tokens": tokens, "workers": workers}
            for name, hop in HOPS.items():
                costs = costs_7b(hop)
                alone = seconds(costs, tokens, 1, LAYERS_7B)
                row[name] = {"chain": seconds(costs, tokens, workers, LAYERS_7B),
                             "tree": tree_seconds(costs, tokens, workers, LAYERS_7B),
                             "crossover": crossover(costs, tokens, LAYERS_7B)}
                row[name] |= {f"{kind} speedup": alone / row[name][kind] for kind in ("chain", "tree")}
            rows.append(row)
            both = ((row[name]["chain speedup"], row[name]["tree speedup"]) for name in HOPS)
            print(f"{tokens:>11} {workers:>7} " + "".join(f"{chain:>12.0f}x {tree:>11.0f}x" for chain, tree in both))
        for name in HOPS:
            print(f"{tokens:>11} {name}: the tree is faster from {rows[-1][name]['crossover']} workers on")
    return rows


def build(args: argparse.Namespace) -> Any:
    """Return the model that is measured."""
    from transformers import xLSTMConfig, xLSTMForCausalLM

    torch.manual_seed(0)
    settings = xLSTMConfig(
        vocab_size=256, hidden_size=args.heads * args.dhhv, num_hidden_layers=args.layers, num_blocks=args.layers,
        num_heads=args.heads, qk_dim_factor=args.dhqk / args.dhhv, mode="inference", return_last_states=True,
        max_inference_chunksize=1 << 30, pad_token_id=0, bos_token_id=0, eos_token_id=None,
    )
    model = xLSTMForCausalLM(settings).eval()
    adapter.last_position_only(model)
    return model


def timed(call: Callable[[], Any]) -> float:
    """Return the seconds of a call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def cell_costs(args: argparse.Namespace, rounds: int) -> tuple[float, float]:
    """Return the seconds of a token in an mLSTM and in a summary, in this process."""
    S = min(args.tokens, 8192)
    q, k = torch.randn(2, 1, args.heads, S, args.dhqk)
    v = torch.randn(1, args.heads, S, args.dhhv)
    igate, fgate = torch.randn(2, 1, args.heads, S)
    calls = (lambda: mlstm_chunkwise(q, k, v, igate, fgate + 3),
             lambda: sequence.summarize(q, k, v, igate, fgate + 3))
    found = []
    for call in calls:
        call()
        found.append(statistics.median(timed(call) for _ in range(rounds)) / S)
    return found[0], found[1]


def hop_cost(args: argparse.Namespace) -> float:
    """Return the seconds to send a state from one worker to the next on this host."""
    import ray

    directory = ray.remote(StateDirectory).options(num_cpus=0).remote()
    state = [torch.zeros(1, args.heads, args.dhqk, args.dhhv), torch.zeros(1, args.heads, args.dhqk),
             torch.zeros(1, args.heads, 1)]
    sender, receiver = StateLink(directory, 0, 0), StateLink(directory, 0, 1)

    def hop(layer: int) -> None:
        sender.store(layer, state)
        receiver.find(layer)

    hop(0)
    taken = statistics.median(timed(lambda layer=layer: hop(layer)) for layer in range(1, 20))  # type: ignore[misc]
    ray.kill(directory)
    return taken


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return predicted and measured seconds of 1 to `--workers` workers, and of one process."""
    import ray

    torch.set_num_threads(1)
    model = build(args)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ray.init(address="local", num_cpus=max(cores, args.workers), include_dashboard=False, log_to_driver=False,
             logging_level="ERROR")
    ids = torch.randint(0, 256, (1, args.tokens), generator=torch.Generator().manual_seed(0))
    with patch("transformers"), torch.inference_mode(), Workers(model, args.workers) as workers:
        calls: dict[str, Callable[[], Any]] = {"one process": lambda: model(input_ids=ids, use_cache=True)}
        for count in range(1, args.workers + 1):
            calls[f"{count} workers"] = lambda count=count: workers.prefill(ids, [1.0] * count)  # type: ignore[misc]
        wanted = calls["one process"]().logits[:, -1]
        errors = {}
        for count in range(1, args.workers + 1):
            found = workers.prefill(ids, [1.0] * count).logits
            errors[f"{count} workers"] = float((found - wanted).norm() / wanted.norm())
        if max(errors.values()) > 1e-4:
            raise SystemExit(f"wrong: {errors}")
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(args.rounds):
            for name, call in calls.items():
                taken[name].append(timed(call))
        cell, summary = cell_costs(args, 5)
        hop = hop_cost(args)
    medians = {name: statistics.median(times) for name, times in taken.items()}
    rest = medians["1 workers"] / args.layers / args.tokens - cell
    ray.shutdown()
    predicted = {}
    for count in range(1, args.workers + 1):
        crowd = max(1.0, count / cores)  # workers that share cores slow each other down
        costs = Costs(rest * crowd, cell * crowd, summary * crowd, hop)
        predicted[f"{count} workers"] = seconds(costs, args.tokens, count, args.layers)
    return {
        "shape": vars(args) | {"json": None}, "cores": cores, "seconds": medians, "predicted": predicted,
        "measured to predicted": {name: medians[name] / predicted[name] for name in predicted},
        "speedup over one process": {name: medians["one process"] / value for name, value in medians.items()},
        "costs_us": Costs(rest * 1e6, cell * 1e6, summary * 1e6, hop * 1e6)._asdict(), "errors": errors,
        "load_average": os.getloadavg(),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--paper", action="store_true", help="only what the model says of xLSTM-7B")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--workers", type=int, default=3, help="most workers, one thread each")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dhqk", type=int, default=128)
    parser.add_argument("--dhhv", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender")
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args(arguments)
    result: dict[str, Any] = {"machine": machine(CPU, "ray", "transformers")}
    if not args.paper:
        result["measured"] = measure(args)
        for name, value in result["measured"].items():
            print(f"{name}: {value}")
    result["xLSTM-7B"] = paper()
    save(result, args.json)


if __name__ == "__main__":
    main()
