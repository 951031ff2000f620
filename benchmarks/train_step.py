"""Time a whole training step of a transformers xLSTM: forward pass, loss, backward pass and AdamW.

    python -m benchmarks.train_step --json result.json      # CPU, float32, hidden 256, 4 layers
    python -m benchmarks.train_step --preset 7b --device cuda --kernel limit_chunk --json result.json

The preset `7b` is xLSTM-7B's shape with 4 blocks, in bfloat16. Contenders are the model as it is (`--kernel` names the
kernel of mlstm_kernels that it runs), the patched model, and both under torch.compile; each once with and once without
gradient checkpointing. Every contender has its own copy of the same weights and reads the same tokens. The losses of
its first steps are compared with those of the first contender; one that differs takes no part. Then they take turns.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import compiled_model
from benchmarks.timing import alternate, machine, peak_bytes, save, tried
from torch_xlstm_ops.patch import patch

STEPS = 3  # that are compared; they also compile and warm up
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2}  # of a loss, relative
PRESETS: dict[str, dict[str, Any]] = {
    "small": {"hidden": 256, "layers": 4, "heads": 4, "vocabulary": 256, "dtype": "float32", "prompt": 512},
    "7b": compiled_model.PRESETS["7b"],
}


class Contender(NamedTuple):
    """One way to train the model."""

    patched: bool = False
    backend: str | None = None  # None: without torch.compile


CONTENDERS = {
    "transformers": Contender(),
    "patched": Contender(patched=True),
    "transformers, compiled": Contender(backend="inductor"),
    "backend xlstm": Contender(backend="xlstm"),
}


class Trainer:
    """A contender's model with its optimiser; a call is one training step, and returns the loss."""

    def __init__(self, model: Any, contender: Contender, ids: Tensor, checkpointing: bool) -> None:
        self.model = copy.deepcopy(model).train()
        self.ids = ids
        if checkpointing:
            enable = getattr(self.model, "activation_checkpointing_enable", None)  # its name in newer transformers
            (enable or self.model.gradient_checkpointing_enable)()
        if contender.patched:
            patch(self.model)
        compiled = torch.compile(self.model, backend=contender.backend) if contender.backend else self.model
        self.run: Callable[..., Any] = compiled
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=ids.device.type == "cuda")

    def __call__(self) -> Tensor:
        loss: Tensor = self.run(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        torch.autograd.backward(loss)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return loss.detach()

    def first(self) -> list[float]:
        """Train the steps that are compared; return their losses."""
        return [self().item() for _ in range(STEPS)]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return the milliseconds, tokens a second and memory of every contender, with and without checkpointing."""
    torch._dynamo.config.recompile_limit = 64  # contenders share the model's code
    model = compiled_model.build(args)
    ids = torch.randint(args.vocabulary, (args.batch, args.prompt), generator=torch.Generator().manual_seed(0))
    ids = ids.to(args.device)
    cases = [_case(args, model, ids, checkpointing) for checkpointing in (False, True)]
    shape = {key: getattr(args, key) for key in (*PRESETS["small"], "batch", "kernel")}
    parameters = sum(p.numel() for p in model.parameters())
    return {"model": shape | {"parameters": parameters}, "machine": machine(ids.device, "transformers"), "cases": cases}


def _case(args: argparse.Namespace, model: Any, ids: Tensor, checkpointing: bool) -> dict[str, Any]:
    """Compare the contenders' losses, then time them in turns."""
    trainers: dict[str, Trainer] = {}
    out: dict[str, str] = {}
    losses: dict[str, list[float]] = {}
    for name, contender in CONTENDERS.items():
        if name in args.without:
            continue
        trainer = Trainer(model, contender, ids, checkpointing)
        found, reason = tried(trainer.first)
        if reason is None and losses:
            reason = _differs(found, next(iter(losses.values())), model.dtype)
        if reason is not None:
            out[name] = reason
            continue
        trainers[name], losses[name] = trainer, found
    held = {name: peak_bytes(trainer, ids.device) for name, trainer in trainers.items()}
    medians = alternate(trainers, ids.device, args.seconds)
    found = {
        "checkpointing": checkpointing, "losses": losses, "no_part": out, "ms": medians, "peak_bytes": held,
        "tokens_per_s": {name: round(1e3 * ids.numel() / ms, 1) for name, ms in medians.items()},
    }
    print(json.dumps(found, indent=1), flush=True)
    return found


def _differs(found: Sequence[float], wanted: Sequence[float], dtype: torch.dtype) -> str | None:
    difference = max(abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True))
    return None if difference <= TOLERANCE[dtype] else f"its losses are {difference:.1e} from the first contender's"


def main(arguments: Sequence[str] | None = None) -> None:
    args = compiled_model.read(compiled_model.flags(__doc__, PRESETS), PRESETS, arguments)
    result = measure(args)
    save(result, args.json)


if __name__ == "__main__":
    main()
