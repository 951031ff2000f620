"""Read a prompt and generate tokens one by one, with each phase timed on its own.

The warm-up and the prompt take the same way: `prefill`, `restore`, `forward_last`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_xlstm_ops import trace
from torch_xlstm_ops.cli.generation.meter import Meter
from torch_xlstm_ops.cli.generation.prompt import Prompt
from torch_xlstm_ops.cli.shared.errors import BadInput
from torch_xlstm_ops.cli.shared.loading import Loaded
from torch_xlstm_ops.context import Progress, StatePool, piece_size, prefill, restore
from torch_xlstm_ops.models import transformers as adapter
from torch_xlstm_ops.runtime import devices
from torch_xlstm_ops.runtime.torch_internals import OperatorMode, operator_name


def pieces(length: int, device: torch.device) -> list[int]:
    """Return the sizes in which a prompt is read if memory is no limit."""
    size = piece_size.default_piece_tokens(device)
    return [size] * (length // size) + ([length % size] if length % size else [])


class StateStore(NamedTuple):
    """The pool and the file that keep the states of prompts, if any."""

    pool: StatePool | None = None
    file: str | None = None

    def __bool__(self) -> bool:
        return self.pool is not None or self.file is not None


def generate_tokens(
    loaded: Loaded, prompt: Prompt, choose: Callable[[Tensor], int], limit: int, meter: Meter,
    progress: Callable[[Progress], None] = lambda step: None, store: StateStore = StateStore(),  # noqa: B008
    read: Callable[[Prompt], tuple[Tensor, object]] | None = None,
) -> Generator[int, None, None]:
    """Yield new tokens after a prompt, at most `limit`; the meter gets a phase `prefill` and a phase `decode`.

    The prefill ends when the first token is on the host. A consumer that stops early closes the iterator.

    progress: called after each piece of a prompt that is read in more than one.
    read: returns a prompt's last logits (V,) and its cache; default reads it here, in pieces.
    Raises BadInput if the logits after the prompt are NaN.
    """
    meter.start("prefill")
    counter = _PieceCounter(meter, progress)
    if read is None:
        logits, cache = read_prompt(loaded, prompt, store, counter)
    else:
        logits, cache = read(prompt)
        counter(Progress(len(prompt), len(prompt), len(prompt), 0.0, None))
    if bool(logits.isnan().any()):
        raise BadInput("the model's logits after the prompt are NaN: try --dtype float32")
    token = choose(logits)
    counter.finish()
    meter.start("decode")
    try:
        yield token
        for _ in range(limit - 1):
            with trace.span("model", phase="decode", device=loaded.device):
                logits, cache = decode_token(loaded, token, cache)
            token = choose(logits)
            meter.add(1)
            yield token
    finally:
        meter.add(0, last=True)


def read_prompt(
    loaded: Loaded, tokens: Iterable[int], store: StateStore = StateStore(),  # noqa: B008
    progress: Callable[[Progress], None] | None = None,
) -> tuple[Tensor, object]:
    """Read tokens in pieces; return the last logits (V,) and the cache."""
    snapshot = prefill(loaded.model, tokens, pool=store.pool, file=store.file, identify=bool(store), progress=progress)
    return snapshot.logits, restore(loaded.model, [snapshot])


def decode_token(loaded: Loaded, token: int, cache: object) -> tuple[Tensor, object]:
    """Advance a cache by a token; return the logits (V,) of the next one and the cache."""
    logits, cache = adapter.forward_last(loaded.model, torch.tensor([[token]], device=loaded.device), cache)
    return logits[0], cache


class _PieceCounter:
    """Adds every piece to the meter; the last one when the first new token is on the host."""

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
    """Run a ``with`` block in inference mode, where the model's blocks tell an active trace which layer runs."""
    hooks = []
    if trace.active():
        for index, block in enumerate(adapter.blocks(loaded.model)):
            hooks.append(block.register_forward_pre_hook(lambda module, args, index=index: trace.set_layer(index)))
        last = adapter.backbone(loaded.model)
        hooks.append(last.register_forward_hook(lambda module, args, out: trace.set_layer(None)))
    try:
        with torch.inference_mode():
            yield
    finally:
        trace.set_layer(None)  # a forward that raised did not
        for hook in hooks:
            hook.remove()


class WarmUp(NamedTuple):
    """What ran in the warm-up."""

    schedules: tuple[str, ...]
    prefill: tuple[str, ...]  # our operators, empty if the model ran its own code
    decode: tuple[str, ...]


def warm_up(loaded: Loaded, prompt: Prompt, *, record: bool = True) -> WarmUp:
    """Compile what the prompt and a decoding step need, with the first block only and states that are not kept.

    All blocks have the same shapes, so one is enough, and the fastest for a large model.

    record: whether to find out what runs, which takes as long again.
    """
    sizes = sorted(set(pieces(len(prompt), loaded.device)), reverse=True)
    tokens = list(itertools.islice(prompt, sum(sizes)))
    with adapter.first_block_only(loaded.model), trace.paused():
        logits, cache = read_prompt(loaded, tokens)
        logits, _ = decode_token(loaded, tokens[0], cache)
        logits.argmax(), logits.isnan().any()  # CUDA loads a kernel at its first use
        found = _recorded(loaded, tokens, sizes[-1]) if record else WarmUp((), (), ())
    devices.synchronize(loaded.device)
    return found


def _recorded(loaded: Loaded, tokens: Sequence[int], size: int) -> WarmUp:
    """Return what runs, from a second pass: a dispatch mode sees operators, and changes how they are compiled."""
    with trace.record() as recording:
        with _OperatorNames() as prefill_names:
            _, cache = read_prompt(loaded, tokens[:size])
        with _OperatorNames() as decode_names:
            decode_token(loaded, tokens[0], cache)
    schedules = dict.fromkeys(entry.schedule for entry in recording.entries() if entry.schedule is not None)
    return WarmUp(tuple(schedules), tuple(prefill_names.names), tuple(decode_names.names))


class _OperatorNames(OperatorMode):
    """Collect the names of our operators that are called."""

    def __init__(self) -> None:
        super().__init__(self._see)
        self.names: dict[str, None] = {}

    def _see(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        name = operator_name(func)
        if name is not None and name.startswith("xlstm::"):
            self.names[name] = None
        return func(*args, **kwargs)
