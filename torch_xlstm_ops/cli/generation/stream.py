"""Read a prompt in pieces and write text, token by token, with each phase timed on its own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_xlstm_ops import trace
from torch_xlstm_ops.cli.generation.meter import Meter
from torch_xlstm_ops.cli.shared.loading import BadInput, Loaded, Prompt
from torch_xlstm_ops.context import Progress, StatePool, piece_size, prefill, restore
from torch_xlstm_ops.models import transformers as adapter
from torch_xlstm_ops.runtime import devices
from torch_xlstm_ops.runtime.torch_internals import OperatorMode, operator_name


def pieces(length: int, device: torch.device) -> list[int]:
    """Return the sizes in which a prompt is read where memory is no concern."""
    size = piece_size.usual(device)
    return [size] * (length // size) + ([length % size] if length % size else [])


class Kept(NamedTuple):
    """Where the states of prompts are kept, if anywhere."""

    pool: StatePool | None = None
    file: str | None = None

    def __bool__(self) -> bool:
        return self.pool is not None or self.file is not None


def stream(
    loaded: Loaded, prompt: Prompt, choose: Callable[[Tensor], int], limit: int, meter: Meter,
    progress: Callable[[Progress], None] = lambda step: None, kept: Kept = Kept(),  # noqa: B008
    read: Callable[[Prompt], tuple[Tensor, object]] | None = None,
) -> Generator[int, None, None]:
    """Yield new tokens after a prompt, at most `limit`; the meter has a phase `prefill` and a phase `decode`.

    The prefill ends when the first token is on the host. A consumer that stops early closes the iterator.

    progress: called after each piece of a prompt that is read in more than one.
    read: returns a prompt's last logits (V,) and the state to go on from; default reads it here, in pieces.
    Raises BadInput when the model's logits after the prompt are not numbers.
    """
    meter.start("prefill")
    counter = _Counter(meter, progress)
    state: object
    if read is None:
        snapshot = prefill(loaded.model, prompt, pool=kept.pool, file=kept.file, identify=bool(kept), progress=counter)
        logits, state = snapshot.logits, restore(loaded.model, [snapshot])
    else:
        logits, state = read(prompt)
        counter(Progress(len(prompt), len(prompt), len(prompt), 0.0, None))
    if bool(logits.isnan().any()):
        raise BadInput("the model must give numbers after the prompt, got NaN: try --dtype float32")
    token = choose(logits)
    counter.finish()
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


class _Counter:
    """Gives the meter every piece; the last counts when the first new token is on the host."""

    def __init__(self, meter: Meter, progress: Callable[[Progress], None]) -> None:
        self._meter, self._progress = meter, progress
        self._waiting = 0

    def __call__(self, step: Progress) -> None:
        if step.position == step.total:
            self._waiting = step.tokens
        else:
            self._meter.add(step.tokens)
        if step.tokens != step.total:
            self._progress(step)

    def finish(self) -> None:
        self._meter.add(self._waiting, last=True, empty=True)


@contextmanager
def prepared(loaded: Loaded) -> Iterator[None]:
    """Make the model's head see the last position only, and its layers tell the trace which one runs."""
    hooks = [adapter.last_position_only(loaded.model)]
    if trace.active():
        for index, block in enumerate(adapter.blocks(loaded.model)):
            hooks.append(block.register_forward_pre_hook(lambda module, args, index=index: trace.set_layer(index)))
        last = adapter.backbone(loaded.model)
        hooks.append(last.register_forward_hook(lambda module, args, out: trace.set_layer(None)))
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


def warm_up(loaded: Loaded, prompt: Prompt) -> Ran:
    """Compile what the prompt and a decode step need, in the first block alone and on a state that is thrown away.

    Every block has the same shapes, so one is enough, and costs the least of a large model's time.
    """
    sizes = sorted(set(pieces(len(prompt), loaded.device)), reverse=True)
    prompt = list(itertools.islice(prompt, sizes[0]))
    with adapter.first_block_alone(loaded.model), trace.paused():
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


class _Seen(OperatorMode):
    """Collect the names of our operators that are called."""

    def __init__(self) -> None:
        super().__init__(self._see)
        self.names: dict[str, None] = {}

    def _see(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        name = operator_name(func)
        if name is not None and name.startswith("xlstm::"):
            self.names[name] = None
        return func(*args, **kwargs)


def _forward(loaded: Loaded, tokens: Sequence[int], state: object) -> tuple[Tensor, object]:
    """Run the model over tokens from a state (None is the beginning); return the last logits (V,) and the state."""
    ids = torch.tensor([tokens], device=loaded.device)
    logits, state = adapter.run(loaded.model, ids, state)
    return logits[0, -1], state
