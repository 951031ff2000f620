"""Measure extended context with the embedded model: a long prompt, and resuming from a stored state.

    python -m benchmarks.context --json result.json

long: tokens of Python's own library in one stream, in a process of its own, whose memory and speed are compared with
those of 16,384; and the second half again in another process, from the state saved in the middle, bitwise equal.
pool: the first token after a prefix of 32,768 and a question, without a pool, from a state in memory, and from disk.
About 7 minutes on two cores; Linux, as it reads the peak of memory from /proc.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import machine, save
from torch_xlstm_ops.context import Progress, Snapshot, StatePool, Storage, codec, prefill, state_file
from torch_xlstm_ops.patch import patch

SHORT = 16_384
CPU = torch.device("cpu")


def load() -> Any:
    """Return the embedded model; in float32, as `xlstm-ops generate` runs it on the CPU."""
    from torch_xlstm_ops.cli.shared.loading import load as load_directory
    from torch_xlstm_ops.models import DEMO_MODEL

    return load_directory(DEMO_MODEL, CPU).model


def library() -> Iterator[int]:
    """Yield the bytes of Python's library repeatedly."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    while True:
        for file in files:
            yield from file.read_bytes()


def equal(a: Snapshot, b: Snapshot) -> bool:
    """Return whether two snapshots are bitwise equal."""
    tensors = zip(itertools.chain([a.logits], *a.layers), itertools.chain([b.logits], *b.layers), strict=True)
    return a.position == b.position and all(torch.equal(x, y) for x, y in tensors)


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds of a call, and its result."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def peak(call: Callable[[], Any]) -> tuple[int, float]:
    """Return the peak of resident bytes during a call, and its seconds."""
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # restarts the measurement of the peak
    taken, _ = seconds(call)
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:")), taken


# Parts, each in its own process


def long_prompt(model: Any, folder: Path, tokens: int) -> dict[str, Any]:
    """Read the stream and save its state in the middle; read a short one before and after it."""
    middle = tokens // 2

    def keep(step: Progress) -> None:
        if step.position == middle:
            shutil.copy(folder / "state", folder / "middle")

    def short() -> tuple[int, float]:
        return peak(lambda: prefill(model, itertools.islice(library(), SHORT)))

    shorts = [short() for _ in range(3)]
    most, taken = peak(lambda: prefill(
        model, itertools.islice(library(), tokens), file=folder / "state", save_every=middle // 2048, progress=keep))
    shorts += [short() for _ in range(3)]
    (folder / "state").rename(folder / "whole")
    speed, usual = tokens / taken, SHORT / statistics.median(s for _, s in shorts)
    return {
        "tokens": tokens, "seconds": round(taken, 1), "tokens_per_second": round(speed),
        "tokens_per_second_of_16k": round(usual), "ratio": round(speed / usual, 3),
        "extra_MiB": round((most - max(bytes_ for bytes_, _ in shorts[:3])) / 2**20, 1),
    }


def second_half(model: Any, folder: Path, tokens: int) -> dict[str, Any]:
    """Continue from the middle, and compare with the state after the whole stream."""
    found = prefill(model, itertools.islice(library(), tokens), file=folder / "middle")
    whole = codec.decode(state_file.read(folder / "whole"))
    return {"in_pieces_bit_identical": equal(found, whole)}


def resuming(model: Any, folder: Path, prefix: int) -> dict[str, Any]:
    """Time the first token after a prefix and a question."""
    tokens = list(itertools.islice(library(), prefix))
    in_memory, on_disk = StatePool(model), StatePool(model, folder, host_bytes=0)
    for pool in (in_memory, on_disk):
        prefill(model, tokens, pool=pool)
    times: dict[str, list[float]] = {"again": [], "host": [], "disk": []}
    identical = True
    for number in range(5):
        prompt = tokens + list(f"\n\ndef test_{number}():\n".encode())
        results = {}
        for name, kept in (("again", None), ("host", in_memory), ("disk", on_disk)):
            taken, results[name] = seconds(lambda p=prompt, k=kept: prefill(model, p, pool=k))  # type: ignore[misc]
            times[name].append(taken)
        identical &= equal(results["host"], results["again"]) and equal(results["disk"], results["again"])
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "prefix": prefix, "first_token_ms": {name: round(value * 1e3, 2) for name, value in medians.items()},
        "sooner": {name: round(medians["again"] / medians[name], 1) for name in ("host", "disk")},
        "bit_identical": identical, "kept": kept_sizes(prefill(model, tokens)),
    }


def kept_sizes(snapshot: Snapshot) -> dict[str, Any]:
    """Return the bytes and the largest error of a state in each storage."""
    packed = {str(kind): codec.encode(snapshot, kind) for kind in Storage}
    return {name: {"bytes": p.nbytes, "error": float(f"{p.error:.2g}")} for name, p in packed.items()}


PARTS: dict[str, Callable[[Any, Path, int], dict[str, Any]]] = {
    "long": long_prompt, "half": second_half, "pool": resuming,
}


def part(name: str, folder: Path, number: int) -> dict[str, Any]:
    """Run a part in a new process."""
    command = [sys.executable, "-m", "benchmarks.context", "--part", name, "--folder", str(folder), "--number",
               str(number)]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return result


def work(name: str, folder: Path, number: int) -> None:
    """Run a part in this process."""
    model = load()
    with patch("transformers"):
        prefill(model, itertools.islice(library(), 2 * 2048 + 16))  # compiles
        print(json.dumps(PARTS[name](model, folder, number)))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tokens", type=int, default=1 << 20, help="of the long prompt, a multiple of 4096 (default %(default)s)")
    add("--prefix", type=int, default=32_768, help="tokens before the question (default %(default)s)")
    add("--json", type=Path, help="file to write the result to")
    for name, kind in (("--part", str), ("--folder", Path), ("--number", int)):
        add(name, type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.part is not None:
        work(args.part, args.folder, args.number)
        return
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        result = {
            "machine": machine(CPU, "transformers"),
            "long": part("long", here, args.tokens) | part("half", here, args.tokens),
            "pool": part("pool", here / "pool", args.prefix),
        }
    print(json.dumps(result, indent=1))
    save(result, args.json)
    if not (result["long"]["in_pieces_bit_identical"] and result["pool"]["bit_identical"]):
        raise SystemExit("a resumed reading must give the same bits as a whole one, got others")


if __name__ == "__main__":
    main()
