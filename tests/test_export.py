"""Laws of export: operators stay calls, and become ATen calls only for exporters that know no others."""

from __future__ import annotations

import importlib.util
import warnings

import pytest
import torch

from tests import oracle
from tests.operator_cases import mlstm_sequence, mlstm_token, ops, slstm_sequence, slstm_token
from torch_xlstm_ops.maths import aten
from torch_xlstm_ops.ops.table import OPERATORS
from torch_xlstm_ops.patch import patch
from torch_xlstm_ops.registrations import decompositions

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # torch copies its own deprecated class
]
MISSING = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
needs_onnx = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
L = 16


class Call(torch.nn.Module):
    """A call of an operator as a module."""

    def __init__(self, op, **how):
        super().__init__()
        self.op, self.how = op, how

    def forward(self, *args):
        return self.op(*args, **self.how)


CALLS = {
    "mlstm_step": (Call(ops.mlstm_step), mlstm_token),
    "mlstm_chunkwise": (Call(ops.mlstm_chunkwise, chunk_size=L), mlstm_sequence),
    "slstm_step": (Call(ops.slstm_step), slstm_token),
    "slstm_sequence": (Call(ops.slstm_sequence), slstm_sequence),
}


def symbolic(state=True):
    """Return dynamic shapes for an mLSTM's sequence."""
    S = torch.export.Dim("S", min=2, max=4096)
    return (({2: S},) * 5 + (None,) * (3 if state else 0),)


def calls(program):
    return [node.target for node in program.graph.nodes if node.op == "call_function"]


def libraries(program):
    return {target.namespace for target in calls(program) if isinstance(target, torch._ops.OpOverload)}


@pytest.mark.parametrize("name", CALLS)
def test_a_decomposed_program_has_only_aten_calls_and_the_same_results(name):
    module, args = CALLS[name][0], tuple(CALLS[name][1]())
    exported = torch.export.export(module, args)
    assert getattr(ops, name).default in calls(exported)
    assert getattr(ops, name).default in calls(exported.run_decompositions())
    decomposed = exported.run_decompositions(decompositions.table())
    assert libraries(decomposed) == {"aten"}
    torch.testing.assert_close(decomposed.module()(*args), module(*args))


def test_a_decomposed_sequence_serves_any_length():
    module = CALLS["mlstm_chunkwise"][0]
    exported = torch.export.export(module, tuple(oracle.draw(oracle.Sizes(S=40))), dynamic_shapes=symbolic())
    decomposed = exported.run_decompositions(decompositions.table())
    assert libraries(decomposed) == {"aten"}
    for S in (2, L, 33, 200):
        args = oracle.draw(oracle.Sizes(S=S), seed=S)
        oracle.assert_close(decomposed.module()(*args), oracle.exact(args), oracle.TOLERANCE[torch.float32])


def test_a_decomposed_slstm_needs_a_known_length():
    S = torch.export.Dim("S", min=2, max=64)
    args = slstm_sequence()[:3]
    exported = torch.export.export(CALLS["slstm_sequence"][0], tuple(args), dynamic_shapes=(({1: S}, None, None),))
    assert calls(exported)[0] == ops.slstm_sequence.default
    with pytest.raises(NotImplementedError, match="x must have a known S"):
        exported.run_decompositions(decompositions.table())


@pytest.mark.parametrize("name", CALLS)
def test_fake_tensors_of_symbolic_sizes_use_the_fake(name, monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    def refuse(*args, **how):
        raise AssertionError("the decomposition was used")

    op = getattr(ops, name).default
    assert op in torch._decomp.decomposition_table
    monkeypatch.setitem(torch._decomp.decomposition_table, op, refuse)
    mode = FakeTensorMode(shape_env=ShapeEnv())
    args = [
        mode.from_tensor(t, symbolic_context=StatelessSymbolicContext([DimDynamic.DYNAMIC] * t.dim()))
        for t in CALLS[name][1]()
    ]
    with mode:
        results = op(*args)
    assert all(isinstance(t.shape[0], torch.SymInt) for t in results)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.usefixtures("fresh_dynamo")
def test_inductor_keeps_the_call_also_where_CI_is_set(name, monkeypatch):
    from torch._inductor.lowering import lowerings
    from torch._inductor.utils import run_and_get_code

    monkeypatch.setenv("CI", "1")
    monkeypatch.delitem(lowerings, getattr(ops, name).default, raising=False)
    module, args = CALLS[name][0], CALLS[name][1]()
    compiled = torch.compile(lambda *args: [t * 2 for t in module(*args)], fullgraph=True, dynamic=True)
    caches = torch._functorch.config.patch(enable_autograd_cache=False)
    with caches, torch._inductor.config.patch(fx_graph_cache=False):
        found, code = run_and_get_code(compiled, *args)
    assert f"torch.ops.xlstm.{name}.default" in code[0]
    torch.testing.assert_close(found, [t * 2 for t in module(*args)])


def in_place(*args):
    args = [*args[:5], *(t.clone() for t in args[5:])]
    return ops.mlstm_step_(*args), *args[5:]


@pytest.mark.parametrize("reapply_views", [True, False])
def test_functional_tensors_take_a_step_in_place(reapply_views):
    args = mlstm_token()
    wrapped = [torch._to_functional_tensor(t) for t in args]
    torch._enable_functionalization(reapply_views=reapply_views)
    try:
        found = in_place(*wrapped)
    finally:
        torch._disable_functionalization()
    for t in found:
        torch._sync(t)
    torch.testing.assert_close([torch._from_functional_tensor(t) for t in found], [*in_place(*args)])


def test_aot_autograd_still_functionalises_a_step_in_place_by_itself():
    graphs = []

    def keep(graph, args):
        graphs.append(str(graph.code))
        return graph

    from torch._dynamo.backends.common import aot_autograd

    compiled = torch.compile(in_place, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
    with torch.no_grad():
        torch.testing.assert_close(compiled(*mlstm_token()), in_place(*mlstm_token()))
    assert "auto_functionalized" in graphs[0]
    assert "xlstm.mlstm_step_.default" in graphs[0]


# ONNX


def to_onnx(module, args, **how):
    """Export to ONNX; return a function that runs what comes of it in onnxruntime."""
    import onnxruntime

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, message="# The axis name")  # two axes of one name
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="onnx.*|ml_dtypes.*|google.*")
        program = torch.onnx.export(module.eval(), tuple(args), dynamo=True, verbose=False, **how)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    names = [given.name for given in session.get_inputs()]

    def run(*args):
        feed = {name: t.numpy() for name, t in zip(names, args, strict=True)}
        return [torch.from_numpy(t) for t in session.run(None, feed)]

    return run


@needs_onnx
@pytest.mark.parametrize("name", CALLS)
def test_onnx_of_an_operator_computes_the_same(name):
    module, args = CALLS[name][0], CALLS[name][1](torch.float32)
    oracle.assert_close(to_onnx(module, args)(*args), module(*args), oracle.TOLERANCE[torch.float32])


@needs_onnx
def test_onnx_of_a_sequence_serves_any_length():
    args = oracle.draw(oracle.Sizes(S=40), state=False)
    run = to_onnx(CALLS["mlstm_chunkwise"][0], args, dynamic_shapes=symbolic(state=False))
    for S in (2, L, 33, 200):
        args = oracle.draw(oracle.Sizes(S=S), seed=S, state=False)
        oracle.assert_close(run(*args), oracle.exact(args), oracle.TOLERANCE[torch.float32])


class StepInPlace(torch.nn.Module):
    """A step that writes over a state of its own, and returns it."""

    def forward(self, *args):
        state = [t * 1 for t in args[5:]]
        return ops.mlstm_step_(*args[:5], *state), *state


def test_a_program_with_a_step_in_place_decomposes_to_aten():
    args = tuple(mlstm_token())
    decomposed = torch.export.export(StepInPlace(), args).run_decompositions(decompositions.table())
    assert libraries(decomposed) == {"aten"}
    oracle.assert_close(decomposed.module()(*args), ops.mlstm_step(*args), 1e-12)


@needs_onnx
def test_onnx_of_a_step_in_place_computes_the_same():
    args = mlstm_token(torch.float32)
    oracle.assert_close(to_onnx(StepInPlace(), args)(*args), ops.mlstm_step(*args), oracle.TOLERANCE[torch.float32])


class Logits(torch.nn.Module):
    """A language model from tokens to logits, without a cache."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids, use_cache=False).logits


@pytest.fixture
def model():
    transformers = pytest.importorskip("transformers")
    config = transformers.xLSTMConfig(vocab_size=32, hidden_size=32, num_hidden_layers=2, num_blocks=2, num_heads=2,
                                      qk_dim_factor=1.0, mode="inference", return_last_states=True)
    return Logits(transformers.xLSTMForCausalLM(config)).eval()


@needs_onnx
@pytest.mark.slow
def test_onnx_of_a_patched_model_computes_the_same(model):
    ids = torch.arange(9)[None]
    with patch("transformers"), torch.no_grad():
        wanted = model(ids)
        run = to_onnx(model, (ids,), dynamic_shapes=({1: torch.export.Dim("S", min=2, max=512)},))
        torch.testing.assert_close(run(ids)[0], wanted, atol=1e-5, rtol=1e-5)
        longer = torch.arange(100)[None] % 32
        torch.testing.assert_close(run(longer)[0], model(longer), atol=1e-5, rtol=1e-5)


def test_every_forward_operator_has_a_decomposition():
    assert {name for name, operator in OPERATORS.items() if operator.decomposition is not None} == set(CALLS)
    assert decompositions.table()[ops.mlstm_step.default] is aten.mlstm_step
