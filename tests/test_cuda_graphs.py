"""Laws of CUDA graphs: which calls are recorded, what is kept, and that a replayed call has the same results."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from tests import oracle
from torch_xlstm_ops import mlstm_chunkwise
from torch_xlstm_ops.ops.mlstm import sequence
from torch_xlstm_ops.runtime import cuda_graphs, state, torch_internals
from torch_xlstm_ops.runtime.cuda_graphs import CudaGraphs, FixedGraph

pytestmark = [
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"),  # torch.compile records one without kernels
]


class NoGraph:
    """Stands for a CUDA graph: replaying it computes nothing."""

    def replay(self):
        pass

    def pool(self):
        return "pool"


class OnCuda(torch.Tensor):
    """A CPU tensor that says it is elsewhere."""

    device = property(lambda self: torch.device("cuda", 0))


@pytest.fixture
def cuda_without_cuda(monkeypatch):
    """Let `CudaGraphs` believe in CUDA; returns the stream it finds, whose number may be set, and the pools used."""
    found = SimpleNamespace(cuda_stream=0, synchronize=lambda: None, pools=[])

    def graph(_, pool, **how):
        found.pools.append(pool)
        return nullcontext()

    for name, stand_in in {
        "device": lambda _: nullcontext(),
        "current_stream": lambda _: SimpleNamespace(cuda_stream=found.cuda_stream, synchronize=found.synchronize),
        "is_current_stream_capturing": lambda: False, "CUDAGraph": NoGraph, "graph": graph,
        "get_device_properties": lambda _: SimpleNamespace(total_memory=1 << 20),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return found


def computing(calls):
    def compute(args):
        calls.append(len(args))
        return (args[0] * 2,)

    return compute


def test_the_call_seen_first_is_forgotten_first(cuda_without_cuda):
    graphs, x = CudaGraphs(first_calls=2), torch.ones(3).as_subclass(OnCuda)
    for what in range(cuda_graphs._SEEN + 1):
        graphs.run(what, computing([]), [x])
    graphs.run(cuda_graphs._SEEN, computing([]), [x])
    assert [key[0] for key in graphs._seen] == [*range(1, cuda_graphs._SEEN + 1)]
    assert [*graphs._seen.values()][-2:] == [1, 2]


def test_graphs_record_what_comes_twice_and_replay_it_after(cuda_without_cuda):
    graphs, calls, x = CudaGraphs(capacity=2), [], torch.ones(3).as_subclass(OnCuda)
    counts = []
    for _ in range(4):
        (result,) = graphs.run("a", computing(calls), [x])
        assert result.shape == x.shape
        counts.append(len(calls))
    assert counts == [1, 2, 2, 2]
    cuda_without_cuda.cuda_stream = 1
    graphs.run("a", computing(calls), [x])
    assert len(calls) == 3  # another stream has its own graph, and has not called before
    for what in "bcd":
        graphs.run(what, computing(calls), [x])
        graphs.run(what, computing(calls), [x])
    assert len(graphs._graphs) == 2
    assert cuda_without_cuda.pools == [None, None, "pool", "pool"]  # graphs of a stream share their memory
    graphs.clear()
    assert not graphs._graphs


def test_arguments_at_the_same_places_are_read_there(cuda_without_cuda):
    graphs, calls = CudaGraphs(capacity=2), []
    x, others = torch.ones(3).as_subclass(OnCuda), [torch.ones(3).as_subclass(OnCuda) for _ in range(3)]
    counts = []
    for t in (x, *others, x, x, x, x, *others):
        graphs.run("a", computing(calls), [t])
        counts.append(len(calls))
    # One call without a graph, one that records it, and one that records another with the tensor that came often.
    assert counts == [1, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3]
    ((in_place, _),) = graphs._in_place._graphs.values()
    assert in_place.inputs == []
    graphs.clear()
    assert not graphs._in_place._graphs
    assert not graphs._in_place._calls


def test_graphs_in_place_are_few_and_need_contiguous_arguments(cuda_without_cuda):
    graphs, calls, columns = CudaGraphs(capacity=1), [], torch.ones(3, 2).as_subclass(OnCuda)[:, 0]
    for _ in range(10):
        graphs.run("columns", computing(calls), [columns])
    assert len(calls) == 2
    assert not graphs._in_place._graphs
    tensors = [torch.ones(3).as_subclass(OnCuda) for _ in range(10)]
    for _ in range(8):  # as layers of a model, more than there is room for: the first stay
        for t in tensors:
            graphs.run("a", computing(calls), [t])
    assert len(calls) == 2 + 2 + cuda_graphs._PLACES
    assert len(graphs._in_place._graphs) == cuda_graphs._PLACES
    few = CudaGraphs(most_bytes=30)  # two results of 12 bytes
    for t in tensors[:4]:
        for _ in range(8):
            few.run("a", computing(calls), [t])
    assert len(few._in_place._graphs) == 2


def test_an_idle_graph_in_place_makes_room(cuda_without_cuda, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "_IDLE", 10)
    graphs, calls = CudaGraphs(capacity=1), []
    tensors = [torch.ones(3).as_subclass(OnCuda) for _ in range(cuda_graphs._PLACES + 1)]
    for t in tensors:
        for _ in range(8):
            graphs.run("a", computing(calls), [t])
    places = [key[-1] for key in graphs._in_place._graphs]
    assert places == [t.data_ptr() for t in tensors[1:]]


def test_what_cannot_be_recorded_in_place_is_not_tried_again(cuda_without_cuda, monkeypatch):
    graphs, calls, x = CudaGraphs(), [], torch.ones(3).as_subclass(OnCuda)
    for _ in range(2):
        graphs.run("a", computing(calls), [x])
    tried = []
    monkeypatch.setattr(cuda_graphs.cuda_graph, "record", lambda *args: tried.append(args))
    for _ in range(10):
        graphs.run("a", computing(calls), [x])
    assert len(tried) == 1


def test_graphs_are_recorded_after_the_first_calls(cuda_without_cuda):
    graphs, calls, x = CudaGraphs(first_calls=3), [], torch.ones(3).as_subclass(OnCuda)
    for _ in range(6):
        graphs.run("a", computing(calls), [x])
    assert len(calls) == 4


def test_what_no_graph_can_hold_runs_without_one(cuda_without_cuda, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", fails)
    state.reset()
    graphs, calls, x = CudaGraphs(), [], torch.ones(3).as_subclass(OnCuda)
    graphs.run("a", computing(calls), [x])
    with pytest.warns(RuntimeWarning, match="without a CUDA graph here, and slower: operation not permitted"):
        graphs.run("a", computing(calls), [x])
    graphs.run("a", computing(calls), [x])
    assert len(calls) == 3
    large, none = CudaGraphs(most_bytes=8), CudaGraphs(capacity=0)
    for _ in range(3):
        large.run("a", computing(calls), [x])
        none.run("a", computing(calls), [x])
    assert len(calls) == 9


def test_a_small_device_holds_small_graphs_only(cuda_without_cuda):
    graphs, calls = CudaGraphs(), []
    x = torch.ones((1 << 20) // 256 // 4 + 1).as_subclass(OnCuda)
    for _ in range(3):
        graphs.run("a", computing(calls), [x])
    assert len(calls) == 3


def test_nothing_is_recorded_inside_a_recording_of_torch_compile(cuda_without_cuda, monkeypatch):
    monkeypatch.setattr(torch_internals, "prepares_graph", lambda device: True)
    graphs, calls, x = CudaGraphs(), [], torch.ones(3).as_subclass(OnCuda)
    for _ in range(3):
        graphs.run("a", computing(calls), [x])
    assert len(calls) == 3


def test_a_fixed_graph_is_recorded_after_calls_with_tensors_in_the_same_places(cuda_without_cuda):
    graph, calls = FixedGraph(2), []
    x, weights, others = (torch.ones(3).as_subclass(OnCuda) for _ in range(3))
    compute = computing(calls)
    found = [graph.replay(compute, [x.clone().as_subclass(OnCuda), weights]) for _ in range(4)]
    assert [result is None for result in found] == [True, True, False, False]
    assert found[2][0].shape == x.shape
    assert calls == [2]  # recorded once
    assert graph.replay(compute, [x, others]) is None  # moved: counts anew
    assert graph.replay(compute, [x, others]) is None
    assert graph.replay(compute, [x, others]) is not None
    assert graph.replay(computing(calls), [x, others]) is None  # another computation
    for _ in range(3):
        found = graph.replay(compute, [x, others])
    assert found is not None
    cuda_without_cuda.cuda_stream = 1
    assert graph.replay(compute, [x, others]) is None  # another stream
    assert calls == [2, 2, 2]


def test_fixed_graphs_share_the_memory_of_one_that_lives(cuda_without_cuda):
    x, first, second = torch.ones(3).as_subclass(OnCuda), FixedGraph(0), FixedGraph(0)
    for graph in (first, second):
        assert graph.replay(computing([]), [x, x]) is not None
    del first, second, graph
    assert FixedGraph(0).replay(computing([]), [x, x]) is not None
    assert cuda_without_cuda.pools == [None, "pool", None]


def test_a_fixed_graph_holds_no_copy_of_what_stays_in_its_place(cuda_without_cuda):
    graph, given = FixedGraph(0), []
    x, weights = (torch.ones(3).as_subclass(OnCuda) for _ in range(2))

    def compute(args):
        given.extend(args)
        return (args[0] * 2,)

    graph.replay(compute, [x, weights])
    assert given[0] is not x
    assert given[1] is weights


def test_a_computation_that_cannot_be_recorded_is_tried_once_for_tensors_in_a_place(cuda_without_cuda):
    def fails(args):
        calls.append(len(args))
        raise RuntimeError("operation not permitted when stream is capturing")

    state.reset()
    graph, calls, x = FixedGraph(0), [], torch.ones(3).as_subclass(OnCuda)
    with pytest.warns(RuntimeWarning, match="without a CUDA graph here, and slower: operation not permitted"):
        assert graph.replay(fails, [x, x]) is None
    assert graph.replay(fails, [x, x]) is None
    assert calls == [2]
    assert FixedGraph(0, allowed=lambda: False).replay(fails, [x, x]) is None
    assert FixedGraph(0).replay(fails, [torch.ones(3), x]) is None  # on the CPU


def weighed(result):
    return oracle.weigh([t.cpu() for t in (result[0], *result[1])])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("with_state", [True, False])
def test_a_replayed_mlstm_has_the_results_and_gradients_of_its_first_call(monkeypatch, with_state):
    monkeypatch.setattr(sequence, "graphs", CudaGraphs())
    for seed in range(4):  # plain, recorded, replayed, replayed
        args = oracle.draw(oracle.Sizes(S=100, DHQK=32, DHHV=64), torch.bfloat16, state=with_state, seed=seed)
        leaves = [t.cuda().requires_grad_() for t in args]
        found = mlstm_chunkwise(*leaves)
        gradients = torch.autograd.grad(weighed(found), leaves)
        with monkeypatch.context() as plain:
            plain.setattr(sequence, "graphs", CudaGraphs(capacity=0))
            wanted = mlstm_chunkwise(*leaves)
            wanted_gradients = torch.autograd.grad(weighed(wanted), leaves)
        for a, b in zip([found[0], *found[1], *gradients], [wanted[0], *wanted[1], *wanted_gradients], strict=True):
            assert torch.equal(a, b)
    assert len(sequence.graphs._graphs) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_torch_compile_records_operators_in_its_own_graphs():
    args = [t.cuda() for t in oracle.draw(oracle.Sizes(S=100, DHQK=32, DHHV=64), torch.float32, state=False)]

    def layers(q, k, v, igate, fgate):
        for _ in range(3):
            v = v + mlstm_chunkwise(q, k, v, igate, fgate)[0]
        return v

    with torch.no_grad():
        wanted = layers(*args)
        compiled = torch.compile(layers, mode="reduce-overhead")
        for _ in range(5):
            torch.testing.assert_close(compiled(*args), wanted)
