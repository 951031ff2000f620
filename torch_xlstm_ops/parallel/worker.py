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
from torch_xlstm_ops.parallel.passing import SLSTM, Passing
from torch_xlstm_ops.parallel.stretches import Stretch
from torch_xlstm_ops.schedules.ray import serialization


class Read(NamedTuple):
    """What became of a stretch."""

    stretch: Stretch
    seconds: float
    layers: tuple[str, ...]  # their operators
    waits: tuple[float, ...]  # seconds of those, layer by layer; none in the first stretch
    sent: tuple[int, ...]  # bytes, layer by layer; none in the last stretch
    cold: bool  # whether the worker had read nothing before, and compiled
    result: Any = None  # of the last: logits and cache as a parcel, in the store until the caller takes it

    @property
    def waited(self) -> float:
        """Return the seconds of waiting for states."""
        return sum(self.waits)

    @property
    def piped(self) -> float:
        """Return the seconds of waiting in sLSTM layers, which nothing can be summed up ahead of."""
        return sum(wait for layer, wait in zip(self.layers, self.waits, strict=False) if layer == SLSTM)

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
        serialization.expect_read_only()
        self._call, self._settings, self._device = call, settings, torch.device(device)
        self._cold = True
        self._model = models.unpack(parcel, self._device, owned=False).eval()
        if call is models.transformers_call:
            models.prepare_transformers(self._model)
            patch("transformers")  # the cache too

    def ready(self) -> int:
        """Return the process's id, once the model is there."""
        return os.getpid()

    def read(self, keeper: Any, prompt: int, tokens: serialization.Packed, stretch: Stretch, ahead: bool) -> Read:
        """Read a stretch's tokens (B, S) of a prompt, with the state that the stretch before leaves with the keeper."""
        began, carry = time.perf_counter(), Carry(keeper, prompt, stretch.number)
        (ids,) = serialization.unpack([tokens], self._device)
        passing = Passing(carry, first=stretch.number == 0, last=stretch.last, ahead=ahead)
        with config.use(**self._settings), torch.inference_mode(), passing:
            logits, cache = self._call(self._model, ids.clone(), stretch.start)
        if not passing.calls:
            raise RuntimeError("a model to be read by several workers must call our operators, got none called")
        result = self._leave(models.pack((logits, cache))) if stretch.last else None
        cold, self._cold = self._cold, False
        return Read(stretch, time.perf_counter() - began, tuple(passing.calls), tuple(carry.waits), tuple(carry.sent),
                    cold, result)

    def _leave(self, parcel: models.Parcel) -> Any:
        """Put what follows from the prompt into the store."""
        import ray

        with serialization.room_for("the logits and states behind the prompt", serialization.nbytes(parcel.tensors)):
            return ray.put(parcel)
