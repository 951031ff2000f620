"""Predict the cost of the operators on an Apple GPU, by counting the work of the generated Metal and the ATen calls.

    python benchmarks/metal_cost.py               # xLSTM-7B's mLSTM: B 1, NH 8, DHQK 256, DHHV 512, S 2048
    python benchmarks/metal_cost.py --tokens 4096 --dtype float32 --json cost.json --detail

THIS IS A PREDICTION: nothing here has run on an Apple GPU. `metal_counter` documents counts and assumptions. The floor
is the work of every method: read the inputs and write the results once, and multiply each token with the state twice
(one product in, one out).

The former scheme (one compiled step a token) and transformers' eager code are counted in the same way. Eager
elementwise operators are charged as Metal launches, which underestimates them.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.metal_counter import CHIPS, Chip, Submission, count, predicted
from benchmarks.timing import save
from tests.mps import emulator

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LAUNCHES_WANTED, FLOOR_WANTED = 1 / 100, 2.0


class Shape(NamedTuple):
    """The sizes of one mLSTM layer's call."""

    B: int
    NH: int
    S: int
    DHQK: int
    DHHV: int


class Contender(NamedTuple):
    """A method; the counted work is repeated `times` times, and covers `tokens` tokens."""

    name: str
    work: str
    run: Callable[[], object]
    times: int
    tokens: int


def floor(shape: Shape, dtype: torch.dtype, chip: Chip) -> float:
    """Return the seconds of the minimal traffic or arithmetic, whichever is longer."""
    B, NH, S, DHQK, DHHV = shape
    width = torch.finfo(dtype).bits // 8
    streams = B * NH * S * (2 * DHQK + 2 * DHHV + 2) * width
    states = B * NH * (DHQK * DHHV + DHQK + 1) * 4 * (2 if S == 1 else 1)  # a step also reads its state
    flops = 4 * B * NH * S * DHQK * DHHV
    return max((streams + states) / chip.bandwidth, flops / chip.flops)


def draw(shape: Shape, dtype: torch.dtype) -> list[Tensor]:
    """Return q, k, v, igate, fgate and the state c, n, m on the device."""
    B, NH, S, DHQK, DHHV = shape
    streams = [torch.zeros(B, NH, S, *d, dtype=dtype) for d in ((DHQK,), (DHQK,), (DHHV,), (), ())]
    states = [torch.zeros(B, NH, *d) for d in ((DHQK, DHHV), (DHQK,), (1,))]
    return [t.to("mps") for t in (*streams, *states)]


def textbook_step(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, c: Tensor, n: Tensor, m: Tensor
) -> tuple[Tensor, ...]:
    """Run one token as the former compiled step: float32 inside, the output by a matrix product."""
    q, k, v, igate, fgate = (t.float() for t in (q, k, v, igate, fgate))
    log_f = F.logsigmoid(fgate)
    m_new = torch.maximum(log_f + m, igate)
    keep, add = torch.exp(log_f + m - m_new), torch.exp(igate - m_new)
    c = keep[..., None] * c + add[..., None] * (k[..., :, None] * v[..., None, :])
    n = keep * n + add * k
    q = q * q.shape[-1] ** -0.5
    numerator = (q[..., None, :] @ c).squeeze(-2)
    denominator = torch.maximum((q * n).sum(-1, keepdim=True).abs(), torch.exp(-m_new)) + 1e-6
    return numerator / denominator, c, n, m_new


def contenders(shape: Shape, dtype: torch.dtype, chunk_size: int | None) -> list[Contender]:
    """Return everything to count at a shape. chunk_size: ours; None takes the device's default."""
    args = draw(shape, dtype)
    token = [t[:, :, 0].clone() for t in args[:3]] + [t[:, :, :1].clone() for t in args[3:5]] + args[5:]
    prefill = functools.partial(torch.ops.xlstm.mlstm_chunkwise, chunk_size=chunk_size)
    step = torch.ops.xlstm.mlstm_step
    compiled_step = torch.compile(textbook_step, fullgraph=True, dynamic=False)
    S = shape.S

    def gradient() -> object:
        inputs = [t.detach().requires_grad_() for t in args[:5]]
        h = prefill(*inputs)[0]
        return torch.autograd.grad(h, inputs, h.detach())

    found = [
        Contender("ours", "prefill", lambda: prefill(*args[:5]), 1, S),
        Contender("ancestor's scheme: a compiled step a token", "prefill", lambda: compiled_step(*token), S, S),
        Contender("ours", "prefill and gradient", gradient, 1, S),
        Contender("ours", "step", lambda: step(*token), 1, 1),
        Contender("ours, in place", "step", lambda: torch.ops.xlstm.mlstm_step_(*token), 1, 1),
        Contender("ancestor's scheme", "step", lambda: compiled_step(*token), 1, 1),
    ]
    return found + _peers(args, token, S)


def _peers(args: list[Tensor], token: list[Tensor], S: int) -> list[Contender]:
    try:
        peer = importlib.import_module("transformers.models.xlstm.modeling_xlstm")
    except ImportError as error:
        print(f"transformers is left out: {error}", file=sys.stderr)
        return []
    names = ("query", "key", "value", "igate", "fgate")
    sequence, one = dict(zip(names, args, strict=False)), dict(zip(names, token, strict=False))
    state = dict(zip(("cstate", "nstate", "mstate"), token[5:], strict=True))

    def prefill() -> object:
        return peer.mlstm_chunkwise_native_autograd(**sequence, return_last_states=True, chunk_size=64)

    return [
        Contender("transformers, eager", "prefill", prefill, 1, S),
        Contender("transformers, eager", "step", lambda: peer.mlstm_recurrent_step_native(**one, **state), 1, 1),
    ]


def measure(shape: Shape, dtype: torch.dtype, chunk_size: int | None) -> list[dict[str, Any]]:
    """Return one row for each contender."""
    rows = []
    for contender in contenders(shape, dtype, chunk_size):
        submissions = count(contender.run)
        n, tokens = contender.times, contender.tokens
        covered = shape._replace(S=tokens)
        rows.append({
            "contender": contender.name,
            "work": contender.work,
            "launches": n * len(submissions),
            "kernels": n * sum(s.name.startswith("generated") for s in submissions),
            "aten": dict(Counter(s.name for s in submissions if not s.name.startswith("generated"))),
            "bytes_per_token": n * sum(s.nbytes for s in submissions) / tokens,
            "flops": n * sum(s.flops for s in submissions),
            "product_flops": n * sum(s.flops for s in submissions if s.is_product),
            "predicted_s": {name: n * predicted(submissions, chip) for name, chip in CHIPS.items()},
            "floor_s": {name: floor(covered, dtype, chip) for name, chip in CHIPS.items()},
            "submissions": [s._asdict() for s in submissions],
        })
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as text."""
    head = f"{'work':22}{'contender':44}{'launches':>9}{'KB/token':>10}{'GFLOP':>9}"
    lines = [head + "".join(f"{name + ' ms':>13}{'x floor':>9}" for name in CHIPS)]
    for row in sorted(rows, key=lambda row: str(row["work"])):
        line = f"{row['work']:22}{row['contender']:44}{row['launches']:>9}{row['bytes_per_token'] / 1e3:>10.0f}"
        line += f"{row['flops'] / 1e9:>9.3f}"
        for name in CHIPS:
            seconds, least = row["predicted_s"][name], row["floor_s"][name]
            times = f"{seconds / least:.1f}" if "gradient" not in row["work"] else ""
            line += f"{seconds * 1e3:>13.3f}{times:>9}"
        lines.append(line)
    return "\n".join(lines)


def detail(rows: Sequence[dict[str, Any]]) -> str:
    """Return the cost of each of our submissions on the first chip, in order."""
    name, chip = next(iter(CHIPS.items()))
    lines = []
    for row in rows:
        if not row["contender"].startswith("ours"):
            continue
        lines.append(f"{row['work']}, {row['contender']}: name, MB, MFLOP, us on {name}")
        for s in (Submission(**fields) for fields in row["submissions"]):
            cost = predicted([s], chip) * 1e6
            lines.append(f"  {s.name:24}{s.nbytes / 1e6:>10.2f}{s.flops / 1e6:>10.1f}{cost:>10.1f}")
    return "\n".join(lines)


def verdict(rows: Sequence[dict[str, Any]]) -> str:
    """Return whether the prefill meets its two targets."""
    ours, ancestor = (next(r for r in rows if r["work"] == "prefill" and r["contender"].startswith(name))
                      for name in ("ours", "ancestor"))
    share = ours["launches"] / ancestor["launches"]
    lines = [f"launches: 1/{1 / share:.0f} of the ancestor's scheme ({_met(share <= LAUNCHES_WANTED)}, wanted 1/100)"]
    for name in CHIPS:
        times = ours["predicted_s"][name] / ours["floor_s"][name]
        lines.append(f"predicted on {name}: {times:.1f}x the floor ({_met(times <= FLOOR_WANTED)}, wanted 2x)")
    return "\n".join(lines)


def _met(holds: bool) -> str:
    return "met" if holds else "NOT met"


def main() -> None:
    """Count, predict, print and, if asked, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, size in (("batch", 1), ("heads", 8), ("tokens", 2048), ("dhqk", 256), ("dhhv", 512)):
        parser.add_argument(f"--{name}", type=int, default=size, help=f"default {size}")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--chunk-size", type=int, help="ours; default the habit for MPS")
    parser.add_argument("--detail", action="store_true", help="print every submission of ours")
    parser.add_argument("--json", type=Path, help="write the rows here")
    given = parser.parse_args()
    if reason := emulator.missing():
        raise SystemExit(f"metal_cost cannot count: {reason}")
    importlib.import_module("torch_xlstm_ops")
    emulator.start()
    emulator.set_dry(True)
    shape = Shape(given.batch, given.heads, given.tokens, given.dhqk, given.dhhv)
    rows = measure(shape, DTYPES[given.dtype], given.chunk_size)
    print("PREDICTION from counted work and published rates; nothing here was measured on an Apple GPU.")
    print(f"{shape}, {given.dtype}")
    print(table(rows))
    if given.detail:
        print(detail(rows))
    print(verdict(rows))
    for name, chip in CHIPS.items():
        print(f"{name}: {chip.bandwidth / 1e9:.0f} GB/s, {chip.flops / 1e12:.1f} TFLOP/s; {chip.source}")
    chips = {name: chip._asdict() for name, chip in CHIPS.items()}
    save({"prediction": True, "shape": shape._asdict(), "dtype": given.dtype, "torch": torch.__version__,
          "chips": chips, "rows": rows}, given.json)


if __name__ == "__main__":
    main()
