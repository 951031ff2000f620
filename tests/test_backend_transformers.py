"""Laws of the Dynamo backend on transformers' own xLSTM, not patched."""

from __future__ import annotations

import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo.utils import counters

transformers = pytest.importorskip("transformers")

from transformers.models.xlstm import modeling_xlstm as peer  # noqa: E402

if peer.external_xlstm:
    pytest.skip("transformers' own xLSTM needs an environment without the package xlstm", allow_module_level=True)

from torch_xlstm_ops.registrations.dynamo import backend, rules, splice, substitution  # noqa: E402

import torch_xlstm_ops  # noqa: E402
from tests.oracle import GRADIENT_TOLERANCE, assert_close  # noqa: E402
from tests.parameters import tail  # noqa: E402
from tests.test_patch_transformers import LAYERS, build, decode, logits, prefill, prompt  # noqa: E402
from torch_xlstm_ops.models import transformers as adapter  # noqa: E402
from torch_xlstm_ops.patch import patch  # noqa: E402

ROOT = Path(__file__).parent.parent
WRAPPER = "transformers.models.xlstm.modeling_xlstm.wrap_chunkwise_arbitrary_sequence_length"
# Logits are capped at 30, and the model adds its own rounding to the operators'.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.25}

ONE_LAYER = {"num_hidden_layers": 1}  # where a second would only be compiled too

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def compiled(model: Any, **options: Any) -> Any:
    return torch.compile(model, backend="xlstm", fullgraph=True, options=options)


def recompiles() -> int:
    return int(counters["stats"]["unique_graphs"]) - 1


@pytest.mark.smoke
@pytest.mark.parametrize(("dtype", "S"), tail([(torch.float32, 70), (torch.float32, 1), (torch.bfloat16, 70)]))
def test_logits_equal_the_eager_models(dtype: torch.dtype, S: int):
    model, ids = build(dtype, **ONE_LAYER), prompt(S)
    found, wanted = logits(compiled(model), ids), logits(model, ids)
    torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE[dtype])


def test_a_step_is_one_graph_for_a_hundred_tokens_and_writes_its_states_in_place():
    model, ids = build(), prompt(140)
    cache, twin = prefill(model, ids[:, :40]).cache, prefill(model, ids[:, :40]).cache
    places = [t.data_ptr() for t in adapter.tensors(cache)]
    found = decode(compiled(model), ids[:, 40:], cache)
    assert recompiles() == 0
    assert not counters["graph_break"]
    assert [t.data_ptr() for t in adapter.tensors(cache)] == places
    torch.testing.assert_close(found, decode(model, ids[:, 40:], twin), rtol=0, atol=TOLERANCE[torch.float32])
    assert adapter.position(cache) == 140


@pytest.mark.slow
def test_states_of_a_step_are_written_without_a_copy():
    from torch._inductor.utils import run_and_get_code

    model, ids = build(), prompt(3)
    cache = prefill(model, ids).cache
    with torch.no_grad():
        _, (code,) = run_and_get_code(adapter.forward, compiled(model), ids[:, -1:], cache)
    assert "xlstm.mlstm" not in code
    assert ".copy_(" not in code


@pytest.mark.slow
def test_prefill_and_decode_share_a_cache():
    model, ids = build(**ONE_LAYER), prompt(40)
    fast = compiled(model)
    out = prefill(fast, ids[:, :33])
    found = torch.cat([out.logits.double(), decode(fast, ids[:, 33:], out.cache)], 1)
    torch.testing.assert_close(found, logits(model, ids), rtol=0, atol=TOLERANCE[torch.float32])


def gradients(model: Any, run: Any, ids: Tensor) -> list[Tensor]:
    model.zero_grad()
    run(ids).logits.square().mean().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.smoke
@pytest.mark.slow
@pytest.mark.parametrize("inlined", [False, True])
def test_gradients_equal_the_patched_models(inlined: bool):
    model, ids = build(mode="train", **ONE_LAYER).train(), prompt(64)
    found = gradients(model, compiled(model, inline=inlined), ids)
    with patch("transformers"):
        wanted = gradients(model, model, ids)
    assert_close(found, wanted, GRADIENT_TOLERANCE[torch.float32])


def test_a_patched_model_is_inlined():
    model, ids = build(**ONE_LAYER), prompt(3)
    wanted = logits(model, ids[:, :1])
    with patch("transformers"):
        text = torch_xlstm_ops.explain(model, ids[:, :1])
        found = logits(compiled(model), ids[:, :1])
    assert "mlstm_step, inlined into the graph" in text
    torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE[torch.float32])


# --- calls that are not replaced ---


def step_args(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    B, NH, DHQK, DHHV = 2, 3, 8, 16
    shapes = {"query": (DHQK,), "key": (DHQK,), "value": (DHHV,), "igate": (1,), "fgate": (1,),
              "cstate": (DHQK, DHHV), "nstate": (DHQK,), "mstate": (1,)}
    return {name: torch.randn(B, NH, *shape, dtype=dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize(("changed", "message"), [
    ({"dtype_state": torch.float64}, "dtype_state must be at most float32 beside float32, got float64"),
    ({"eps": -1e-6}, "eps must be a number of at least 0, got -1e-06"),
    ({"query": torch.ones(2, 3, 8).double()}, "query, key, value must share one of .* float64, float32, float32"),
])
def test_a_call_that_the_operator_cannot_replace_warns_with_the_reason(changed: dict[str, Any], message: str):
    given = step_args() | changed

    def call() -> Any:
        return peer.mlstm_recurrent_step_native(**given)

    with pytest.warns(UserWarning, match=message):
        found = torch.compile(call, backend="xlstm", fullgraph=True)()
    torch.testing.assert_close(found, call())
    assert re.search(f"is not replaced: {message}", torch_xlstm_ops.explain(call))


def test_states_are_returned_in_dtype_state():
    given = step_args()
    fn = torch.compile(peer.mlstm_recurrent_step_native, backend="xlstm", fullgraph=True)
    h, state = fn(**given, dtype_state=torch.bfloat16)
    assert {t.dtype for t in state} == {torch.bfloat16}
    assert h.dtype == torch.float32


# --- other backends ---

def child(code: str) -> str:
    """Run code in a process of its own, on the branch that this one is on, and return what it prints."""
    command = [sys.executable, "-c", "from tests import branches; branches.choose()\n" + code]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT, timeout=300).stdout


TARGETS = """
import sys, torch
import transformers.models.xlstm.modeling_xlstm as peer
if {loaded}:
    torch.compile(lambda x: x, backend="xlstm")
    assert "torch_xlstm_ops.registrations.dynamo.rules" in sys.modules
shape = lambda *size: torch.ones(2, 3, *size)
def record(module, examples):
    print([(node.op, getattr(node.target, "__name__", node.target)) for node in module.graph.nodes])
    return module
args = [shape(70, 8)] * 3 + [shape(70)] * 2
config = type("Config", (), dict(chunk_size=64, eps=1e-6, autocast_kernel_dtype="float32", mode="inference",
                                 inference_state_dtype="float32", return_last_states=True))
torch.compile(peer.xLSTMBackend(config), backend=record, fullgraph=True)(*args)
"""


@pytest.mark.slow
def test_other_backends_get_an_unchanged_graph():
    graphs = [child(TARGETS.format(loaded=loaded)) for loaded in (False, True)]
    assert graphs[0] == graphs[1] != ""


@pytest.mark.slow
def test_backends_side_by_side_keep_their_own_code():
    model, ids = build(), prompt(70)
    seen: list[str] = []

    def record(module: fx.GraphModule, examples: Any) -> Any:
        seen.extend(str(splice.operator_of(node)) for node in module.graph.nodes if splice.operator_of(node))
        return module

    ours, theirs = compiled(model), torch.compile(model, backend=record, fullgraph=True)
    for run in (ours, theirs, ours, theirs):
        logits(run, ids)
    assert seen == []
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.slow
def test_rules_of_a_module_imported_later_are_installed():
    check = f"""
import importlib.util, sys, torch
fn = torch.compile(lambda run, ids: run(ids), backend="xlstm", fullgraph=True)
assert importlib.util.find_spec("transformers.models.xlstm.modeling_xlstm")
assert "transformers.models.xlstm.modeling_xlstm" not in sys.modules
import transformers.models.xlstm.modeling_xlstm
from torch_xlstm_ops.registrations.dynamo import substitution
assert "{WRAPPER}" in substitution._installed
"""
    child(check)


def test_a_function_with_other_arguments_is_not_replaced_and_warns(monkeypatch: pytest.MonkeyPatch):
    index, rule = next((i, r) for i, r in enumerate(rules.RULES) if r.place == WRAPPER)
    table = list(rules.RULES)
    table[index] = rule._replace(module="made_up")
    module = types.ModuleType("made_up")
    setattr(module, rule.function, lambda query, key: query)
    monkeypatch.setitem(sys.modules, "made_up", module)
    monkeypatch.setattr(rules, "RULES", table)
    message = r"backend xlstm does not replace a function: made_up.* must take value, .* got \(query, key\)"
    with pytest.warns(RuntimeWarning, match=message):
        substitution.install("made_up")
    assert table[index].place not in substitution._installed


@pytest.mark.smoke
def test_every_rule_for_transformers_is_installed():
    ours = [rule for rule in rules.RULES if rule.module == peer.__name__]
    assert len(ours) == 4
    assert {rule.place for rule in ours} <= substitution._installed


# --- the explanation ---


def test_the_explanation_names_functions_operators_breaks_and_the_plan():
    model, ids = build(), prompt(100)
    with torch.no_grad():
        text = torch_xlstm_ops.explain(model, ids, use_cache=True, options={"inline": False})
    text = re.sub(r"^torch_xlstm_ops .*: ", "", text)
    text = re.sub(r"at .*:\d+ in", "at FILE:LINE in", text)
    text = re.sub(r"\d+ nodes", "N nodes", text)
    head, plan = text.split("plan\n")
    assert head == f"""\
1 graph, 0 graph breaks
graph 0: N nodes
  2 x {WRAPPER}
    at FILE:LINE in forward
    -> torch.ops.xlstm.mlstm_chunkwise, a call, q (2, 2, 100, 32) float32 on cpu
"""
    assert "schedule  inductor" in plan


@pytest.mark.smoke
def test_the_explanation_counts_graph_breaks():
    model, ids = build(), prompt(5)

    def broken(ids: Tensor) -> Tensor:
        out = model(ids).logits
        torch._dynamo.graph_break()
        result: Tensor = out + 1
        return result

    with torch.no_grad():
        text = torch_xlstm_ops.explain(broken, ids)
    assert ": 2 graphs, 1 graph break\n" in text
    assert "no xLSTM found" in text


@pytest.mark.slow
def test_explain_can_be_called_any_number_of_times():
    model, ids = build(), prompt(1)
    texts = {torch_xlstm_ops.explain(model, ids) for _ in range(12)}
    assert len(texts) == 1


# --- CUDA graphs, export ---


def test_states_are_marked_static_for_cuda_graphs():
    model, ids = build(), prompt(3)
    cache = prefill(model, ids).cache
    held: list[int] = []

    def count(module: fx.GraphModule) -> int:
        inputs = module.graph.find_nodes(op="placeholder")
        return sum("_dynamo_static_input_type" in node.meta.get("tensor_dict", {}) for node in inputs)

    def look(module: fx.GraphModule, examples: Any) -> Any:
        parameters = count(module)  # these are known to stay anyway
        backend.prepare(module, backend.parse_options(None, None))
        backend.mark_static_inputs(module)
        held.append(count(module) - parameters)
        return module

    look.wants_xlstm_rules = True  # type: ignore[attr-defined]
    decode(torch.compile(model, backend=look, fullgraph=True), ids[:, :1], cache)
    assert held == [3 * LAYERS + 1]  # and the count of tokens
    assert backend.parse_options(None, "reduce-overhead").inductor["triton.cudagraphs"] is True


@pytest.mark.slow
def test_a_mode_is_passed_to_inductor_and_keeps_the_tokens():
    model, ids = build(), prompt(12)
    cache, twin = prefill(model, ids).cache, prefill(model, ids).cache
    fast = torch.compile(model, backend="xlstm", mode="reduce-overhead", fullgraph=True)
    torch.testing.assert_close(decode(fast, ids, cache), decode(model, ids, twin), rtol=0, atol=1e-4)


LOAD = """
import sys, torch
if {ours}:
    import torch_xlstm_ops
ids, wanted = torch.load({folder!r} + "/wanted.pt")
run = torch._inductor.aoti_load_package({folder!r} + "/model.pt2")
torch.testing.assert_close(run(ids), wanted, rtol=0, atol=1e-4)
"""


class Logits(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(ids, use_cache=False).logits
        return logits


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")  # torch warns of itself
def test_a_patched_model_is_exported_and_runs_where_our_operators_are_registered(tmp_path: Path):
    model, ids = build(**ONE_LAYER), prompt(20)
    length = torch.export.Dim("S", min=6, max=4096)
    with patch("transformers"), torch.no_grad():
        whole = Logits(model).eval()
        program = torch.export.export(whole, (ids,), dynamic_shapes={"ids": {1: length}})
        longer = prompt(77)
        torch.save((longer, whole(longer)), tmp_path / "wanted.pt")
    assert [n for n in program.graph.nodes if "xlstm.mlstm_chunkwise" in str(n.target)]
    torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    runs = [
        subprocess.run([sys.executable, "-c", LOAD.format(ours=ours, folder=str(tmp_path))], capture_output=True,
                       text=True, timeout=300)
        for ours in (True, False)
    ]
    assert runs[0].returncode == 0, runs[0].stderr
    assert "Could not find schema for xlstm::mlstm_chunkwise" in runs[1].stderr
