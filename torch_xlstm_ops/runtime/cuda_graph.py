"""One recorded CUDA graph: what it reads and writes, how it is recorded, and how it is replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_xlstm_ops.runtime import torch_internals
from torch_xlstm_ops.runtime.state import warn_once

RawCompute = Callable[[list[Tensor]], Sequence[Tensor]]


class Graph(NamedTuple):
    """A recorded computation."""

    graph: torch.cuda.CUDAGraph
    stream: torch.cuda.Stream
    inputs: list[Tensor]  # copies of arguments; it reads other ones where they are
    outputs: tuple[Tensor, ...]

    @property
    def output_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.outputs)


def may_replay(device: torch.device, allowed: Callable[[], bool]) -> bool:
    """Return whether graphs are allowed on a device, and the current stream is not being recorded itself."""
    return device.type == "cuda" and allowed() and not torch.cuda.is_current_stream_capturing()


def pool_of(graphs: Iterable[Graph], stream: torch.cuda.Stream) -> Any:
    """Return the memory that the graphs of a stream share, or None; it lives as long as one of them."""
    return next((other.graph.pool() for other in graphs if other.stream == stream), None)


def record(
    compute: RawCompute, moving: Sequence[Tensor], fixed: Sequence[Tensor], stream: torch.cuda.Stream, pool: Any
) -> Graph | None:
    """Return a graph of ``compute([*moving, *fixed])``, or None and warn where it cannot be recorded.

    moving: arguments that the graph has copies of. fixed: those that it uses where they are. pool: of memory, if any.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.inference_mode(False), torch.no_grad():  # inference tensors could not be written to outside
            inputs = [t.clone(memory_format=torch.contiguous_format) for t in moving]
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                outputs = compute([*inputs, *fixed])
    except RuntimeError as error:
        warn_once(f"a call runs without a CUDA graph here, and slower: {error}")
        return None
    return Graph(graph, stream, inputs, tuple(outputs))


def replay(graph: Graph, args: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Copy the arguments that the graph has copies of, replay it, and return copies of its results."""
    if graph.inputs:
        torch_internals.copy_all(graph.inputs, args)
    graph.graph.replay()
    results = tuple(torch.empty_like(t) for t in graph.outputs)
    torch_internals.copy_all(results, graph.outputs)
    return results
