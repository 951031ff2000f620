"""CUDA graphs of computations whose shapes come again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torch_xlstm_ops.runtime import forks, torch_internals
from torch_xlstm_ops.runtime.bounded_cache import BoundedCache
from torch_xlstm_ops.runtime.state import warn_once

Compute = Callable[[Sequence[Tensor]], tuple[Tensor, ...]]
_SEEN = 256  # kinds of call whose number is known
_SHARE = 256  # of the device's memory, one part of which the arguments of a graph may take


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    stream: torch.cuda.Stream
    inputs: list[Tensor]
    outputs: tuple[Tensor, ...]


class CudaGraphs:
    """Records a computation that comes again on a stream as a CUDA graph, and replays it from then on.

    A graph reads and writes memory of its own: arguments are copied in and results out, on the caller's stream, so
    nothing that a caller holds is ever overwritten. A stream has its own graphs, as two streams may run at once. The
    graphs of a stream share the memory of their intermediate results, as only one of them runs at a time.

    capacity: most graphs kept, the oldest used leaves first; 0 records none. most_bytes: of arguments, for one graph.
    first_calls: how often a computation runs without a graph: recording one takes longer than it saves in few calls.
    allowed: asked at each call whether graphs may be used.
    """

    def __init__(
        self, capacity: int = 8, most_bytes: int = 128 << 20, first_calls: int = 1,
        allowed: Callable[[], bool] = lambda: True,
    ) -> None:
        self.capacity, self.most_bytes, self.first_calls, self.allowed = capacity, most_bytes, first_calls, allowed
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._seen: BoundedCache[Hashable, int | None] = BoundedCache(_SEEN)  # calls so far; None: cannot be recorded
        self._lock = forks.new_lock()

    def run(self, what: Hashable, compute: Compute, args: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return ``compute(args)``, the arguments made contiguous.

        what: everything that `compute` depends on beside the arguments' shapes.
        """
        results = self.replay(what, compute, args)
        return compute([t.contiguous() for t in args]) if results is None else results

    def replay(self, what: Hashable, compute: Compute, args: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        """Return ``compute(args)`` by a graph, or None where there is none and none is to be recorded."""
        device = args[0].device
        if device.type != "cuda" or self.capacity == 0 or not self.allowed():
            return None
        if torch.cuda.is_current_stream_capturing():
            return None
        with torch.cuda.device(device), self._lock:
            stream = torch.cuda.current_stream(device)
            key = (what, stream.cuda_stream, device, *[(t.shape, t.dtype) for t in args])
            graph = self._graphs.get(key)
            if graph is None:
                if not self._comes_again(key, device, args):
                    return None
                graph = self._record(key, stream, compute, args)
            if graph is None:
                return None
            self._graphs.move_to_end(key)
            torch_internals.copy_all(graph.inputs, args)
            graph.graph.replay()
            results = tuple(torch.empty_like(t) for t in graph.outputs)
            torch_internals.copy_all(results, graph.outputs)
            return results

    def clear(self) -> None:
        """Forget every graph and free its memory."""
        with self._lock:
            self._trim(0)
            self._seen.clear()

    def _comes_again(self, key: Hashable, device: torch.device, args: Sequence[Tensor]) -> bool:
        """Count a call without a graph; return whether it is time to record one."""
        calls = self._seen.keep(key, 0)
        if calls == 0:
            most = min(self.most_bytes, torch.cuda.get_device_properties(device).total_memory // _SHARE)
            if sum(t.numel() * t.element_size() for t in args) > most:
                calls = self._seen[key] = None
        if calls is None:
            return False
        self._seen[key] = calls + 1
        return calls >= self.first_calls and not torch_internals.prepares_graph(device)

    def _record(
        self, key: Hashable, stream: torch.cuda.Stream, compute: Compute, args: Sequence[Tensor]
    ) -> _Graph | None:
        self._trim(self.capacity - 1)
        others = (other.graph.pool() for other in self._graphs.values() if other.stream == stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.inference_mode(False), torch.no_grad():  # inference tensors could not be written to outside
                inputs = [t.clone(memory_format=torch.contiguous_format) for t in args]
                with torch.cuda.graph(graph, pool=next(others, None), capture_error_mode="thread_local"):
                    outputs = compute(inputs)
        except RuntimeError as error:
            self._seen[key] = None
            warn_once(f"a call runs without a CUDA graph here, and slower: {error}")
            return None
        self._graphs[key] = _Graph(graph, stream, inputs, outputs)
        return self._graphs[key]

    def _trim(self, most: int) -> None:
        """Drop the graphs used longest ago, each once its stream has finished with it."""
        while len(self._graphs) > most:
            _, graph = self._graphs.popitem(last=False)
            graph.stream.synchronize()
