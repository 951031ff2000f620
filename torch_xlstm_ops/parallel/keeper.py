"""Where stretches leave their states: an actor that knows which object of Ray's store holds each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from torch_xlstm_ops.schedules.ray import serialization


class Keeper:
    """The states after each layer of each stretch of the prompt that is being read.

    It holds references: a state goes straight from the worker that found it to the one that needs it. What is lost
    with a worker or a node is asked for again, and comes when that stretch has been read again.
    """

    def __init__(self) -> None:
        self._left: dict[tuple[int, int], list[Any]] = {}  # all that were ever left, the newest last
        self._missed: set[int] = set()
        self._over = -1  # the last prompt that is over; they are numbered
        self._changed = asyncio.Condition()

    async def keep(self, prompt: int, stretch: int, layer: int, state: list[Any]) -> None:
        """Note where a state is; `state` is a list of one reference, which Ray then does not follow."""
        async with self._changed:
            if prompt > self._over:
                self._left.setdefault((stretch, layer), []).append(state)
                self._missed.discard(stretch)
                self._changed.notify_all()

    async def find(self, prompt: int, stretch: int, layer: int, lost: int) -> list[Any]:
        """Return where a state is, once it has been left more than `lost` times.

        Raises RuntimeError when the prompt is over first.
        """
        def left() -> list[Any]:
            return self._left.get((stretch, layer), [])

        async with self._changed:
            if lost and len(left()) == lost:
                self._missed.add(stretch)
            await self._changed.wait_for(lambda: prompt <= self._over or len(left()) > lost)
            if prompt <= self._over:
                raise RuntimeError("a stretch must be read before its prompt is over")
            return left()[-1]  # type: ignore[no-any-return]

    async def missed(self) -> list[int]:
        """Return the stretches whose states somebody found lost."""
        return sorted(self._missed)

    async def end(self, prompt: int) -> None:
        """Forget a prompt, and release whoever waits."""
        async with self._changed:
            self._left.clear()
            self._missed.clear()
            self._over = prompt
            self._changed.notify_all()


class Carry:
    """One stretch's dealings with the keeper, and what they cost."""

    def __init__(self, keeper: Any, prompt: int, stretch: int) -> None:
        self._keeper, self._prompt, self._stretch = keeper, prompt, stretch
        self.waits: list[float] = []  # seconds, layer by layer
        self.sent: list[int] = []  # bytes, layer by layer

    def find(self, layer: int) -> list[Tensor]:
        """Return the state that the stretch before left after a layer, when it has."""
        import ray
        from ray.exceptions import ObjectLostError

        began, lost = time.perf_counter(), 0
        while True:
            (state,) = ray.get(self._keeper.find.remote(self._prompt, self._stretch - 1, layer, lost))
            try:
                found = serialization.unpack(ray.get(state))
            except ObjectLostError:  # with its owner or its node
                lost += 1
                continue
            self.waits.append(time.perf_counter() - began)
            return found

    def keep(self, layer: int, state: Sequence[Tensor]) -> None:
        """Leave the state after a layer to the stretch behind."""
        import ray

        packed = serialization.pack(state)
        self.sent.append(serialization.nbytes(packed))
        with serialization.room_for(f"the state after layer {layer}", self.sent[-1]):
            state_there = ray.put(packed)
        self._keeper.keep.remote(self._prompt, self._stretch, layer, [state_there])
