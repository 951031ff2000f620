"""What runs in a worker's process: a model, and the stretches that it is given to read."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from torch_xlstm_ops import config
from torch_xlstm_ops.parallel import models
from torch_xlstm_ops.parallel.keeper import Carry
from torch_xlstm_ops.parallel.passing import MLSTM, Passing
from torch_xlstm_ops.parallel.stretches import Stretch
from torch_xlstm_ops.schedules.ray import wire


class Read(NamedTuple):
    """What became of a stretch."""

    stretch: Stretch
    seconds: float
    waited: float  # seconds of those
    sent: tuple[int, ...]  # bytes, layer by layer
    waiting_layers: int  # that could not run ahead of the state before them
    result: models.Parcel | None = None  # of the last: logits and cache

    @property
    def speed(self) -> float:
        """Return the tokens a second of work."""
        return (self.stretch.stop - self.stretch.start) / max(self.seconds - self.waited, 1e-9)


class Worker:
    """An actor that holds a model."""

    def __init__(
        self, parcel: models.Parcel, call: models.Call, settings: Mapping[str, Any], device: str, threads: int
    ) -> None:
        from torch_xlstm_ops.patch import patch

        os.environ.pop(config.SETTINGS["trace"].variable, None)  # the file is the caller's
        torch.set_num_threads(threads)
        wire.expect_read_only()
        self._call, self._settings, self._device = call, settings, torch.device(device)
        self._model = models.unpack(parcel, self._device, owned=False).eval()
        if call is models.transformers_call:
            models.prepare_transformers(self._model)
            patch("transformers")  # the cache too

    def ready(self) -> int:
        """Return the process's id, once the model is there."""
        return os.getpid()

    def read(self, keeper: Any, prompt: int, tokens: wire.Packed, stretch: Stretch, ahead: bool) -> Read:
        """Read a stretch's tokens (B, S) of a prompt, with the state that the stretch before leaves with the keeper."""
        began, carry = time.perf_counter(), Carry(keeper, prompt, stretch.number)
        (ids,) = wire.unpack([tokens], self._device)
        passing = Passing(carry, first=stretch.number == 0, last=stretch.last, ahead=ahead)
        with config.use(**self._settings), torch.inference_mode(), passing:
            logits, cache = self._call(self._model, ids.clone(), stretch.start)
        if not passing.calls:
            raise RuntimeError("a model to be read by several workers must call our operators, got none called")
        result = models.pack((logits, cache)) if stretch.last else None
        waiting = sum(name != MLSTM or not ahead for name in passing.calls) if stretch.number else 0
        return Read(stretch, time.perf_counter() - began, carry.waited, tuple(carry.sent), waiting, result)
