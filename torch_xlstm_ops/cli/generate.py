"""Read a prompt in pieces and write text, token by token, with each phase timed on its own."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from torch_xlstm_ops import config, devices, trace
from torch_xlstm_ops.cli.loading import BadInput, Loaded
from torch_xlstm_ops.cli.meter import Meter

# Prompt tokens a forward, unless a segment is longer: progress is seen on a CPU, and a GPU has enough to do.
PIECES = {"cpu": 2048, "cuda": 8192, "mps": 4096}


def pieces(length: int, device: torch.device) -> list[int]:
    """Return the sizes in which a prompt is read: whole segments, so that the carry is the schedule's own."""
    most = PIECES[device.type]
    segment = config.current().segment or most
    size = segment * max(1, most // segment)
    return [size] * (length // size) + ([length % size] if length % size else [])


def stream(
    loaded: Loaded, prompt: Sequence[int], choose: Callable[[Tensor], int], limit: int, meter: Meter,
    progress: Callable[[int], None] = lambda done: None,
) -> Generator[int, None, None]:
    """Yield new tokens after a prompt, at most `limit`; the meter has a phase `prefill` and a phase `decode`.

    The prefill ends when the first token is on the host. A consumer that stops early closes the iterator.

    progress: called with the prompt tokens read so far after each piece.
    Raises BadInput when the model's logits after the prompt are not numbers.
    """
    meter.start("prefill")
    state: object = None
    done = 0
    sizes = pieces(len(prompt), loaded.device)
    for size in sizes:
        with trace.span("model", phase="prefill", device=loaded.device):
            logits, state = _forward(loaded, prompt[done : done + size], state)
        done += size
        if done < len(prompt):
            meter.add(size)
        if len(sizes) > 1:
            devices.synchronize(loaded.device)
            progress(done)
    if bool(logits.isnan().any()):
        raise BadInput("the model must give numbers after the prompt, got NaN: try --dtype float32")
    token = choose(logits)
    meter.add(sizes[-1], last=True)
    meter.start("decode")
    try:
        yield token
        for _ in range(limit - 1):
            with trace.span("model", phase="decode", device=loaded.device):
                logits, state = _forward(loaded, [token], state)
            token = choose(logits)
            meter.add(1)
            yield token
    finally:
        meter.add(0, last=True)


@contextmanager
def prepared(loaded: Loaded) -> Iterator[None]:
    """Make the model's head see the last position only, and its layers tell the trace which one runs."""
    head = loaded.model.get_output_embeddings()
    hooks = [head.register_forward_pre_hook(lambda module, args: (args[0][:, -1:],))]
    if trace.active():
        for index, block in enumerate(loaded.model.backbone.blocks):
            hooks.append(block.register_forward_pre_hook(lambda module, args, index=index: trace.set_layer(index)))
        hooks.append(loaded.model.backbone.register_forward_hook(lambda module, args, out: trace.set_layer(None)))
    try:
        with torch.inference_mode():
            yield
    finally:
        trace.set_layer(None)  # a forward that raised has not
        for hook in hooks:
            hook.remove()


class Ran(NamedTuple):
    """What the warm-up saw run."""

    schedules: tuple[str, ...]
    prefill: tuple[str, ...]  # our operators, empty where the model ran its own code
    decode: tuple[str, ...]


def warm_up(loaded: Loaded, prompt: Sequence[int]) -> Ran:
    """Compile what the prompt and a decode step need, in the first block alone and on a state that is thrown away.

    Every block has the same shapes, so one is enough, and costs the least of a large model's time.
    """
    sizes = sorted(set(pieces(len(prompt), loaded.device)), reverse=True)
    with _first_block(loaded.model), trace.paused():
        state: object = None
        for size in sizes:
            state = _forward(loaded, prompt[:size], state)[1]
        logits = _forward(loaded, prompt[:1], state)[0]
        logits.argmax(), logits.isnan().any()  # CUDA loads a kernel at its first use
        # Watched apart from compiling, which does not work under a dispatch mode.
        with trace.record() as recording:
            with _Seen() as prefill:
                state = _forward(loaded, prompt[: sizes[-1]], None)[1]
            with _Seen() as decode:
                _forward(loaded, prompt[:1], state)
    schedules = dict.fromkeys(entry.schedule for entry in recording.entries() if entry.schedule is not None)
    devices.synchronize(loaded.device)
    return Ran(tuple(schedules), tuple(prefill.names), tuple(decode.names))


@contextmanager
def _first_block(model: Any) -> Iterator[None]:
    blocks = model.backbone.blocks
    model.backbone.blocks = blocks[:1]
    try:
        yield
    finally:
        model.backbone.blocks = blocks


class _Seen(TorchDispatchMode):
    """Collect the names of our operators that are called."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: dict[str, None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "xlstm":
            self.names[func._schema.name] = None
        return func(*args, **(kwargs or {}))


def _forward(loaded: Loaded, tokens: Sequence[int], state: object) -> tuple[Tensor, object]:
    """Run the model over tokens from a state (None is the beginning); return the last logits (V,) and the state."""
    ids = torch.tensor([tokens], device=loaded.device)
    out = loaded.model(input_ids=ids, cache_params=state, use_cache=True)
    return out.logits[0, -1], out.cache_params
