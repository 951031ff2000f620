"""The states between shards: a Ray actor that knows where each is."""

from __future__ import annotations

import asyncio
from typing import Any


class StateDirectory:
    """Where the states after each layer of each shard of the current prompt are; runs as a Ray actor.

    A place is a list of an object of Ray's store, or a handle to memory of a GPU, and the time when the state was there
    (seconds since the epoch). The states themselves go from worker to worker. A state that is lost with a worker or a
    node is reported in `missed`, and `find` waits until its shard has been read again.
    """

    def __init__(self) -> None:
        self._states: dict[tuple[int, int], list[Any]] = {}  # by shard and layer; the newest last
        self._missed: set[int] = set()
        self._ended = -1  # the number of the last prompt that has ended
        self._changed = asyncio.Condition()

    async def store(self, prompt: int, shard: int, layer: int, place: list[Any]) -> None:
        """Store a place; it is a list, as Ray would replace a bare reference by its value."""
        async with self._changed:
            if prompt > self._ended:
                self._states.setdefault((shard, layer), []).append(place)
                self._missed.discard(shard)
                self._changed.notify_all()

    async def find(self, prompt: int, shard: int, layer: int, lost: int) -> list[Any]:
        """Return the place of a state, once it has been stored more than `lost` times; nothing if the prompt ends."""
        def stored() -> list[Any]:
            return self._states.get((shard, layer), [])

        async with self._changed:
            if lost and len(stored()) == lost:
                self._missed.add(shard)
            await self._changed.wait_for(lambda: prompt <= self._ended or len(stored()) > lost)
            if prompt <= self._ended:
                return []
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
