"""Recall: the share of right answers by the number of pairs, and by the distance from a pair to its query."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.quality.contenders import THEIRS, Conditions, cut
from benchmarks.quality.recall import Batch, Mix, Recall, Size, draw
from torch_xlstm_ops import config, mlstm_chunkwise, mlstm_step
from torch_xlstm_ops.maths.shapes import dtype_name
from torch_xlstm_ops.patch import patch

WEIGHTS = Path(__file__).parent / "weights"
MODELS = ("mlstm", "slstm")
SPLIT = (1, 63, 64, 200, 17)  # tokens a piece, repeated
SEED = 1  # of the rows; training has another


class Way(NamedTuple):
    """One way to run a model: the mLSTM function, the dtype of weights and activations, and the pieces of the input."""

    name: str
    schedule: str | None = "inductor"
    dtype: torch.dtype = torch.float32
    mix: Mix = mlstm_chunkwise
    pieces: tuple[int, ...] = ()  # empty: the whole row at once
    patched: bool = False  # only for transformers' own code

    @contextmanager
    def active(self) -> Iterator[None]:
        with config.use(schedule=self.schedule):
            if not self.patched:
                yield
                return
            with patch("transformers"):
                yield


def load(file: Path) -> Recall:
    """Return a trained model in float32."""
    from safetensors import safe_open

    if not file.exists():
        raise SystemExit(f"{file} must be there: python -m benchmarks.train_mqar writes it")
    with safe_open(file, "pt") as opened:
        model = Recall(Size(**json.loads(opened.metadata()["size"])))
        model.load_state_dict({key: opened.get_tensor(key) for key in opened.keys()})  # noqa: SIM118
    return model.float().eval()


def weights(name: str) -> Path:
    """Return the file of a trained model's weights."""
    return WEIGHTS / f"mqar_{name}.safetensors"


def by_steps(q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, *state: Tensor) -> Any:
    """Run `mlstm_step` with the arguments of `mlstm_chunkwise`, for one token."""
    h, after = mlstm_step(q[:, :, 0], k[:, :, 0], v[:, :, 0], igate, fgate, *state)
    return h[:, :, None], after


def theirs(size: Size) -> Mix | str:
    """Return transformers' mLSTM, or ours if its classes are patched, with the arguments of `mlstm_chunkwise`.

    Returns why where there is none.
    """
    from transformers import xLSTMConfig

    try:
        from transformers.models.xlstm.modeling_xlstm import xLSTMBackend
    except ImportError:
        return "transformers builds its xLSTM on the package xlstm where that is installed"
    width = size.NH * size.DHHV
    backend = xLSTMBackend(xLSTMConfig(
        hidden_size=width, num_heads=size.NH, qk_dim_factor=size.DHQK / size.DHHV, num_hidden_layers=1,
        chunkwise_kernel="chunkwise--native_autograd", mode="inference", return_last_states=True,
    ))

    def mix(*arguments: Tensor) -> Any:
        return backend(*arguments)

    return mix


def ways(size: Size, schedules: Sequence[str]) -> tuple[list[Way], dict[str, str]]:
    """Return every way that can run here, the reference first, and the reasons against the others."""
    own = theirs(size)
    half = [Way(dtype_name(d), dtype=d) for d in (torch.bfloat16, torch.float16, torch.float64)]
    found = [
        *(Way(name, name) for name in schedules),
        Way("step by step", mix=by_steps, pieces=(1,)),
        Way("in pieces", pieces=SPLIT),
        *half,
    ]
    if isinstance(own, str):
        return found, {THEIRS: own}
    return [*found, Way(f"{THEIRS}, patched", mix=own, patched=True), Way(THEIRS, mix=own)], {}


@torch.inference_mode()
def answer(model: Recall, rows: Batch, way: Way, device: torch.device) -> Tensor:
    """Return the likeliest values (B, P)."""
    ids, P = rows.ids.to(device), rows.answers.shape[1]
    S = ids.shape[1]
    if not way.pieces:
        logits, _ = model(ids, last=P, mix=way.mix)
        return logits.argmax(-1).cpu()  # type: ignore[no-any-return]
    found, states = [], None
    start = 0
    for size in [*cut(2 * P, way.pieces), *cut(S - 2 * P, way.pieces)]:
        logits, states = model(ids[:, start : start + size], states, mix=way.mix)
        if start >= 2 * P:
            found.append(logits.argmax(-1))
        start += size
    return torch.cat(found, 1).cpu()


def by_distance(rows: Sequence[Batch], answers: Sequence[Tensor]) -> dict[str, dict[str, float]]:
    """Return the share of right answers and their number by distance, in buckets that double."""
    distance = torch.cat([batch.distance.flatten() for batch in rows])
    right = torch.cat([(batch.answers == found).flatten() for batch, found in zip(rows, answers, strict=True)])
    bucket = distance.double().log2().floor().int()
    return {
        f"{2**b} to {2 ** (b + 1) - 1}": {
            "accuracy": round(right[bucket == b].double().mean().item(), 5), "answers": int((bucket == b).sum()),
        }
        for b in sorted(set(bucket.tolist()))
    }


def evaluate(model: Recall, pairs: Sequence[int], answers: int, conditions: Conditions) -> dict[str, Any]:
    """Return one model's accuracy for each way and number of pairs, over at least `answers` answers."""
    generator = torch.Generator().manual_seed(SEED)
    rows = {P: draw(model.size, -(-answers // P), P, generator) for P in pairs}
    accuracy: dict[str, dict[str, float]] = {}
    differing: dict[str, dict[str, int]] = {}
    reference: dict[int, Tensor] = {}
    possible, left_out = ways(model.size, conditions.schedules)
    for way in possible:
        copied = copy.deepcopy(model).to(conditions.device, way.dtype)
        with way.active():
            found = {P: answer(copied, batch, way, conditions.device) for P, batch in rows.items()}
        reference = reference or found
        accuracy[way.name] = {
            str(P): round((found[P] == batch.answers).double().mean().item(), 5) for P, batch in rows.items()
        }
        differing[way.name] = {str(P): int((found[P] != reference[P]).sum()) for P in rows}
        conditions.say(f"{way.name}: {accuracy[way.name]}")
    return {
        "size": model.size._asdict(), "parameters": sum(p.numel() for p in model.parameters()),
        "answers": {str(P): batch.answers.numel() for P, batch in rows.items()},
        "accuracy": accuracy, "differing": differing, "left_out": left_out,
        "by_distance": {
            str(P): by_distance([batch], [reference[P]]) for P, batch in rows.items()
        },
    }


def run(conditions: Conditions) -> dict[str, Any]:
    """Return the results of all trained models."""
    pairs, answers = ([64, 256], 512) if conditions.quick else ([64, 128, 256, 512, 1024, 2048], 4096)
    results = {}
    for name in MODELS:
        conditions.say(f"mqar: {name}")
        file = weights(name)
        training = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
        results[name] = {
            "trained_pairs": int(training["arguments"]["pairs"]), **evaluate(load(file), pairs, answers, conditions),
        }
    return {"models": results}
