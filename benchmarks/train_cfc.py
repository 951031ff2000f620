"""Train the weights of the closed-form continuous-time cell that `XLSTM_OPS_TUNE=cfc` uses, on simulated traces.

    python -m benchmarks.train_cfc          # a minute on two cores; writes torch_xlstm_ops/schedules/online/cfc.json

A trace is one plan beside the default: the logarithm of its speed stays, and jumps at random times, with or without a
change of the machine's load. It is observed with noise after random times. The cell predicts it just before each
observation, and the loss is the negative logarithm of the likelihood of the true value.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from torch_xlstm_ops.runtime import files
from torch_xlstm_ops.schedules.online.cfc import GAIN, HIDDEN, LOAD, WEIGHTS, Cell

BATCH, OBSERVATIONS = 256, 16
SPEED_MEAN, SPEED_DEVIATION = -0.1, 0.25  # of the logarithm of a plan's speed, before it is observed
JUMPS = 0.03  # a unit of time
SHORTEST, LONGEST = 0.005, 20.0  # units of time between observations
QUIETEST, LOUDEST = 0.02, 0.25  # deviation of an observation
DIGITS = 4


class Traces(NamedTuple):
    """A batch of traces, each field (BATCH, OBSERVATIONS)."""

    elapsed: Tensor  # since the observation before
    true: Tensor  # in units of GAIN
    seen: Tensor  # likewise, with noise
    load: Tensor  # in units of LOAD


def draw(generator: torch.Generator) -> Traces:
    """Draw a batch of traces."""

    def uniform(low: float, high: float, *size: int) -> Tensor:
        return low + (high - low) * torch.rand(*size, generator=generator)

    size = (BATCH, OBSERVATIONS)
    elapsed = torch.exp(uniform(math.log(SHORTEST), math.log(LONGEST), *size))
    elapsed[:, 0] = 0.0
    jumps = torch.rand(*size, generator=generator) < 1 - torch.exp(-JUMPS * elapsed)
    loaded = torch.rand(*size, generator=generator) < 0.5
    drawn = SPEED_MEAN + SPEED_DEVIATION * torch.randn(*size, generator=generator)
    true, load = [drawn[:, 0]], [torch.zeros(BATCH)]
    for index in range(1, OBSERVATIONS):
        here, with_load = jumps[:, index], jumps[:, index] & loaded[:, index]
        true.append(torch.where(here, drawn[:, index], true[-1]))
        fading = load[-1] * torch.exp(-elapsed[:, index])  # the long run follows the present
        load.append(torch.where(with_load, uniform(-2, 2, BATCH), fading))
    noise = torch.exp(uniform(math.log(QUIETEST), math.log(LOUDEST), BATCH, 1))
    whole = torch.stack(true, 1)
    seen = whole + noise * torch.randn(*size, generator=generator)
    loads = torch.stack(load, 1) + 0.1 * torch.randn(*size, generator=generator)
    return Traces(elapsed, whole / GAIN, seen / GAIN, loads)


def loss_of(cell: Cell, traces: Traces) -> Tensor:
    """Return the mean negative logarithm of the likelihood of the true values."""
    state, parts = torch.zeros(BATCH, HIDDEN), []
    nothing = torch.zeros(BATCH)
    for index in range(OBSERVATIONS):
        elapsed, load = traces.elapsed[:, index, None], traces.load[:, index]
        before = cell(torch.stack((nothing, nothing, load), 1), state, elapsed)
        mean, log_deviation = cell.predict(before)
        away = (traces.true[:, index] - mean) * torch.exp(-log_deviation)
        parts.append(log_deviation + away.square() / 2)
        state = cell(torch.stack((traces.seen[:, index], nothing + 1, load), 1), state, elapsed)
    return torch.stack(parts).mean()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    given = parser.parse_args(arguments)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the tensors are small
    generator, cell = torch.Generator().manual_seed(0), Cell()
    optimizer = torch.optim.Adam(cell.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, given.steps)
    for step in range(given.steps):
        loss = loss_of(cell, draw(generator))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(cell.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == given.steps - 1:
            print(step, round(loss.item(), 4), flush=True)
    weights = {name: torch.round(value, decimals=DIGITS).tolist() for name, value in cell.state_dict().items()}
    rounded = {name: [[round(v, DIGITS) for v in row] if isinstance(row, list) else round(row, DIGITS) for row in value]
               for name, value in weights.items()}
    with files.replacing(given.out) as file:
        json.dump({"trained": f"python -m benchmarks.train_cfc --steps {given.steps}", "gain": GAIN, "load": LOAD,
                   "weights": rounded}, file)
        file.write("\n")


if __name__ == "__main__":
    main()
