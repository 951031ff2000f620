"""CUDA graphs of computations whose shapes come again."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from torch_xlstm_ops.runtime import cuda_graph, forks, torch_internals
from torch_xlstm_ops.runtime.bounded_cache import BoundedCache
from torch_xlstm_ops.runtime.cuda_graph import Graph, RawCompute, may_replay, pool_of

Compute = Callable[[Sequence[Tensor]], tuple[Tensor, ...]]
_SEEN = 256  # kinds of call whose number is known
_PLACES, _CALLS_IN_PLACE = 4, 4  # graphs of arguments in place for each other one, and calls before one is recorded
_IDLE = 1000  # calls without it, after which another graph may take the place of one of arguments in place
_SHARE = 256  # of the device's memory, one part of which the arguments of a graph may take


class CudaGraphs:
    """Records a computation that comes again on a stream as a CUDA graph, and replays it from then on.

    A graph reads and writes memory of its own: arguments are copied in and results out, on the caller's stream, so
    nothing that a caller holds is ever overwritten. A stream has its own graphs, as two streams may run at once. The
    graphs of a stream share the memory of their intermediate results, as only one of them runs at a time. Where
    arguments are at the same places in memory again and again, another graph reads them there.

    capacity: most graphs kept, the oldest used leaves first; 0 records none. most_bytes: of arguments, for one graph.
    first_calls: how often a computation runs without a graph: recording one takes longer than it saves in few calls.
    allowed: asked at each call whether graphs may be used.
    """

    def __init__(
        self, capacity: int = 8, most_bytes: int = 128 << 20, first_calls: int = 1,
        allowed: Callable[[], bool] = lambda: True,
    ) -> None:
        self.capacity, self.most_bytes, self.first_calls, self.allowed = capacity, most_bytes, first_calls, allowed
        self._graphs: OrderedDict[Hashable, Graph] = OrderedDict()
        self._in_place = _InPlace(_PLACES * capacity, most_bytes)
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
        if self.capacity == 0 or not may_replay(device, self.allowed):
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
            in_place = self._in_place.find(key, graph, compute, args)
            return cuda_graph.replay(graph, args) if in_place is None else cuda_graph.replay(in_place, ())

    def clear(self) -> None:
        """Forget every graph and free its memory."""
        with self._lock:
            self._trim(0)
            self._in_place.clear()
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
    ) -> Graph | None:
        self._trim(self.capacity - 1)
        graph = cuda_graph.record(compute, args, (), stream, pool_of(self._graphs.values(), stream))
        if graph is None:
            self._seen[key] = None
            return None
        self._graphs[key] = graph
        return graph

    def _trim(self, most: int) -> None:
        """Drop the graphs used longest ago, each once its stream has finished with it."""
        while len(self._graphs) > most:
            _, graph = self._graphs.popitem(last=False)
            graph.stream.synchronize()


class _InPlace:
    """Graphs that read their arguments where they are. All of a stream's use the memory of its other graphs.

    Where there is no room for another one, it takes the place of one that was not used during the last _IDLE calls.
    most: graphs kept; most_bytes: of the results of all.
    """

    def __init__(self, most: int, most_bytes: int) -> None:
        self.most, self.most_bytes = most, most_bytes
        self._graphs: OrderedDict[Hashable, tuple[Graph, int]] = OrderedDict()  # with the number of its last call
        self._calls: BoundedCache[Hashable, int | None] = BoundedCache(_SEEN)  # None: it cannot be recorded
        self._number = 0  # of this call

    def find(self, key: Hashable, copying: Graph, compute: Compute, args: Sequence[Tensor]) -> Graph | None:
        """Return a graph for arguments at these places, or None where they have not been there often.

        copying: the graph with copies of the arguments.
        """
        self._number += 1
        places = (key, *[t.data_ptr() for t in args])
        known = self._graphs.get(places)
        graph = self._recorded(places, copying, compute, args) if known is None else known[0]
        if graph is not None:
            self._graphs[places] = graph, self._number
            self._graphs.move_to_end(places)
        return graph

    def clear(self) -> None:
        """Forget every graph and free its memory."""
        while self._graphs:
            self._drop()
        self._calls.clear()

    def _recorded(
        self, places: Hashable, copying: Graph, compute: Compute, args: Sequence[Tensor]
    ) -> Graph | None:
        """Return a new graph if it is time for one and there is room."""
        calls = self._calls.keep(places, 0)
        if calls is None:
            return None
        calls = self._calls[places] = calls + 1
        if calls < _CALLS_IN_PLACE or not all(t.is_contiguous() for t in args) or not self._has_room(copying):
            return None
        if torch_internals.prepares_graph(args[0].device):
            return None
        graph = cuda_graph.record(compute, (), args, copying.stream, copying.graph.pool())
        if graph is None:
            self._calls[places] = None
        return graph

    def _has_room(self, like: Graph) -> bool:
        """Drop graphs that are idle as long as there is no room; return whether there is some."""
        while len(self._graphs) >= self.most or self._bytes() + like.output_bytes > self.most_bytes:
            oldest = next(iter(self._graphs.values()), None)
            if oldest is None or self._number - oldest[1] <= _IDLE:
                return False
            self._drop()
        return True

    def _bytes(self) -> int:
        return sum(graph.output_bytes for graph, _ in self._graphs.values())

    def _drop(self) -> None:
        _, (graph, _) = self._graphs.popitem(last=False)
        graph.stream.synchronize()


class FixedGraph:
    """Replays one computation as a CUDA graph while all tensors but the first stay where they are in memory.

    The first argument is copied in and the results are copied out, as by `CudaGraphs`. The others are read, and written
    to, where they are: they may be large. Where one of them moved, the graph is dropped, and another one is recorded
    after so many calls with them in their new places.

    first_calls: with tensors in the same places, that run without a graph. allowed: asked at each call.
    """

    def __init__(self, first_calls: int = 4, allowed: Callable[[], bool] = lambda: True) -> None:
        self.first_calls, self.allowed = first_calls, allowed
        self._key: Hashable = None
        self._calls: int | None = 0  # with this key; None: it cannot be recorded
        self._graph: Graph | None = None
        with _fixed_lock:
            _fixed.add(self)

    def replay(self, compute: RawCompute, args: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        """Return ``compute(args)`` by a graph, or None where there is none and none is to be recorded."""
        device = args[0].device
        if not may_replay(device, self.allowed):
            return None
        x, *fixed = args
        with torch.cuda.device(device), _fixed_lock:
            stream = torch.cuda.current_stream(device)
            key = compute, device, stream.cuda_stream, x.shape, x.dtype, *map(Tensor.data_ptr, fixed)
            if key != self._key:
                self._forget(key)
            if self._graph is None and self._is_time(device):
                pool = pool_of([one._graph for one in _fixed if one._graph is not None], stream)
                self._graph, self._calls = cuda_graph.record(compute, [x], fixed, stream, pool), None
            return None if self._graph is None else cuda_graph.replay(self._graph, [x])

    def _is_time(self, device: torch.device) -> bool:
        """Count a call without a graph; return whether to record one."""
        if self._calls is None:
            return False
        self._calls += 1
        return self._calls > self.first_calls and not torch_internals.prepares_graph(device)

    def _forget(self, key: Hashable) -> None:
        if self._graph is not None:
            self._graph.stream.synchronize()
        self._key, self._calls, self._graph = key, 0, None


_fixed: weakref.WeakSet[FixedGraph] = weakref.WeakSet()
_fixed_lock = forks.new_lock()  # the graphs of a stream share memory, which holds results until they are copied out
