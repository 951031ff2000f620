"""The walk of a call: which rooms see its q, and that each is entered from a room above."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType

import pytest
import torch
from torch import Tensor

from tests.oracle import Sizes, draw
from tests.test_house import LEVEL, ROOT, SOURCES, room
from torch_xlstm_ops import config

ROOMS = {str(path): room(path) for path in SOURCES}
MOST_ROOMS = 6


def holds(value: object, memory: int) -> bool:
    """Return whether a value is a tensor on this memory, or a list that has one."""
    if isinstance(value, Tensor):
        return not value.is_meta and value.untyped_storage().data_ptr() == memory
    return isinstance(value, (list, tuple)) and any(holds(part, memory) for part in value)


def walk(call: Callable[[], object], q: Tensor) -> tuple[set[str], set[tuple[str, str]]]:
    """Return the rooms whose functions are given q, and from which room each was entered."""
    seen: set[str] = set()
    entered: set[tuple[str, str]] = set()
    memory, looking = q.untyped_storage().data_ptr(), False

    def look(frame: FrameType, event: str, argument: object) -> None:
        nonlocal looking
        here = ROOMS.get(frame.f_code.co_filename)
        if event != "call" or here is None or looking:
            return
        looking = True
        given = any(holds(value, memory) for value in frame.f_locals.values())
        looking = False
        if given:
            seen.add(here)
            above = frame.f_back
            while above is not None and above.f_code.co_filename not in ROOMS:
                above = above.f_back
            if above is not None and ROOMS[above.f_code.co_filename] != here:
                entered.add((ROOMS[above.f_code.co_filename], here))

    sys.setprofile(look)
    try:
        call()
    finally:
        sys.setprofile(None)
    return seen, entered


@pytest.mark.parametrize("state", [False, True], ids=["from zeros", "from a state"])
def test_a_prompt_passes_few_rooms_downwards(state: bool, small_chunks: None) -> None:
    args = [t.contiguous() for t in draw(Sizes(S=32), state=state)]
    with torch.no_grad(), config.use(chunk_size=16):
        for _ in range(2):  # the walk is that of a steady call
            torch.ops.xlstm.mlstm_chunkwise(*args)
        rooms, entered = walk(lambda: torch.ops.xlstm.mlstm_chunkwise(*args), args[0])
    assert rooms <= {"registrations", "ops", "schedules", "kernels", "maths", "runtime"}
    assert len(rooms) <= MOST_ROOMS
    upwards = {(above, here) for above, here in entered if LEVEL[here] > LEVEL[above]}
    assert not upwards


def test_a_token_passes_few_rooms_downwards() -> None:
    args = draw(Sizes(S=1))
    step = [*(t[:, :, 0].contiguous() for t in args[:3]), *args[3:]]
    with torch.no_grad():
        for _ in range(2):
            torch.ops.xlstm.mlstm_step(*step)
        rooms, entered = walk(lambda: torch.ops.xlstm.mlstm_step(*step), step[0])
    assert rooms <= {"registrations", "ops"}
    assert all(LEVEL[here] <= LEVEL[above] for above, here in entered)


def test_every_room_has_a_folder_or_a_file() -> None:
    assert all((ROOT / "torch_xlstm_ops" / name).is_dir() or (ROOT / "torch_xlstm_ops" / f"{name}.py").is_file()
               or name in ("registrations", "backend") for name in LEVEL)
