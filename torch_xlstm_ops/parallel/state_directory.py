"""The states between shards: a Ray actor that maps each to an object of Ray's store, and a worker's link to it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from torch_xlstm_ops.schedules.ray import serialization


class StateDirectory:
    """References to the states after each layer of each shard of the current prompt; runs as a Ray actor.

    The states themselves go from worker to worker. A state that is lost with a worker or a node is reported in
    `missed`, and `find` waits until its shard has been read again.
    """

    def __init__(self) -> None:
        self._states: dict[tuple[int, int], list[Any]] = {}  # by shard and layer; the newest last
        self._missed: set[int] = set()
        self._ended = -1  # the number of the last prompt that has ended
        self._changed = asyncio.Condition()

    async def store(self, prompt: int, shard: int, layer: int, reference: list[Any]) -> None:
        """Store a reference; `reference` is a list of it, as Ray would replace a bare one by its value."""
        async with self._changed:
            if prompt > self._ended:
                self._states.setdefault((shard, layer), []).append(reference)
                self._missed.discard(shard)
                self._changed.notify_all()

    async def find(self, prompt: int, shard: int, layer: int, lost: int) -> list[Any]:
        """Return the reference to a state, once it has been stored more than `lost` times.

        Raises RuntimeError if the prompt ends first.
        """
        def stored() -> list[Any]:
            return self._states.get((shard, layer), [])

        async with self._changed:
            if lost and len(stored()) == lost:
                self._missed.add(shard)
            await self._changed.wait_for(lambda: prompt <= self._ended or len(stored()) > lost)
            if prompt <= self._ended:
                raise RuntimeError(f"prompt {prompt} ended before shard {shard} was read")
            return stored()[-1]  # type: ignore[no-any-return]

    async def missed(self) -> list[int]:
        """Return the shards whose states were found to be lost."""
        return sorted(self._missed)

    async def end(self, prompt: int) -> None:
        """Drop the states of a prompt, and wake the callers of `find`."""
        async with self._changed:
            self._states.clear()
            self._missed.clear()
            self._ended = prompt
            self._changed.notify_all()


class StateLink:
    """A shard's connection to the directory; records waiting times and sizes."""

    def __init__(self, directory: Any, prompt: int, shard: int) -> None:
        self._directory, self._prompt, self._shard = directory, prompt, shard
        self.waits: list[float] = []  # seconds, layer by layer
        self.sent: list[int] = []  # bytes, layer by layer

    def find(self, layer: int) -> list[Tensor]:
        """Return the state after a layer of the previous shard; wait for it."""
        import ray
        from ray.exceptions import ObjectLostError

        began, lost = time.perf_counter(), 0
        while True:
            (state,) = ray.get(self._directory.find.remote(self._prompt, self._shard - 1, layer, lost))
            try:
                found = serialization.from_bytes(ray.get(state))
            except ObjectLostError:  # its owner or its node died
                lost += 1
                continue
            self.waits.append(time.perf_counter() - began)
            return found

    def store(self, layer: int, state: Sequence[Tensor]) -> None:
        """Store the state after a layer, for the next shard."""
        import ray

        data = serialization.to_bytes(state)
        self.sent.append(serialization.nbytes(data))
        with serialization.store_errors(f"the state after layer {layer}", self.sent[-1]):
            reference = ray.put(data)
        self._directory.store.remote(self._prompt, self._shard, layer, [reference])
