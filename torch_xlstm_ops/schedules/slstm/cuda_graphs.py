"""CUDA graphs of computations whose shapes come again."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torch_xlstm_ops.runtime import forks

Compute = Callable[[Sequence[Tensor]], tuple[Tensor, ...]]


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    stream: torch.cuda.Stream
    inputs: list[Tensor]
    outputs: tuple[Tensor, ...]


class CudaGraphs:
    """Records a computation whose shapes come a second time on a stream as a CUDA graph, and replays it from then on.

    A graph reads and writes memory of its own: arguments are copied in and results out, on the caller's stream, so
    nothing that a caller holds is ever overwritten. A stream has its own graphs, as two streams may run at once.

    capacity: most graphs kept, the oldest used leaves first; 0 records none. most_bytes: of arguments, for one graph.
    """

    def __init__(self, capacity: int = 8, most_bytes: int = 128 << 20) -> None:
        self.capacity, self.most_bytes = capacity, most_bytes
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._seen: OrderedDict[Hashable, bool] = OrderedDict()  # whether it may be recorded when it comes again
        self._lock = forks.new_lock()

    def run(self, what: Hashable, compute: Compute, args: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return ``compute(args)``. what: everything that `compute` depends on beside the arguments' shapes."""
        if args[0].device.type == "cuda":
            results = self._replay(what, compute, args)
            if results is not None:
                return results
        return compute([t.contiguous() for t in args])

    def clear(self) -> None:
        """Forget every graph and free its memory."""
        with self._lock:
            self._trim(0)
            self._seen.clear()

    def _replay(self, what: Hashable, compute: Compute, args: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        """Return the results by a graph, or None where there is none and none is to be recorded."""
        device, size = args[0].device, sum(t.numel() * t.element_size() for t in args)
        if self.capacity == 0 or size > self.most_bytes or torch.cuda.is_current_stream_capturing():
            return None
        with torch.cuda.device(device), self._lock:
            stream = torch.cuda.current_stream(device)
            key = (what, stream.cuda_stream, device, *[(t.shape, t.dtype) for t in args])
            graph = self._graphs.get(key)
            if graph is None and not self._comes_again(key):
                return None
            if graph is None:
                graph = self._record(key, stream, compute, args)
            if graph is None:
                return None
            self._graphs.move_to_end(key)
            for static, given in zip(graph.inputs, args, strict=True):
                static.copy_(given)
            graph.graph.replay()
            return tuple(t.clone() for t in graph.outputs)

    def _comes_again(self, key: Hashable) -> bool:
        may = self._seen.get(key)
        if may is None:
            self._seen[key] = True
            if len(self._seen) > 256:
                self._seen.popitem(last=False)
        return bool(may)

    def _record(
        self, key: Hashable, stream: torch.cuda.Stream, compute: Compute, args: Sequence[Tensor]
    ) -> _Graph | None:
        self._trim(self.capacity - 1)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.inference_mode(False), torch.no_grad():  # inference tensors could not be written to outside
                inputs = [t.clone(memory_format=torch.contiguous_format) for t in args]
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    outputs = compute(inputs)
        except RuntimeError as error:
            self._seen[key] = False
            warnings.warn(f"sLSTM runs without a CUDA graph here: {error}", RuntimeWarning, stacklevel=2)
            return None
        self._graphs[key] = _Graph(graph, stream, inputs, outputs)
        return self._graphs[key]

    def _trim(self, most: int) -> None:
        """Drop the graphs used longest ago, each once its stream has finished with it."""
        while len(self._graphs) > most:
            _, graph = self._graphs.popitem(last=False)
            graph.stream.synchronize()
