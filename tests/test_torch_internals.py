"""Laws of private torch APIs: each is tested, one package uses them, and every fallback works."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from torch_xlstm_ops.runtime import torch_internals

ROOT = Path(__file__).parent.parent
ROOM = ROOT / "torch_xlstm_ops/runtime/torch_internals"
TOPS = ("torch_xlstm_ops", "registrations")
SOURCES = [path for top in TOPS for path in (ROOT / top).rglob("*.py") if ROOM not in path.parents]
PUBLIC = {"torch._check"}  # documented by torch, whatever its name says


@pytest.mark.smoke
@pytest.mark.parametrize("status", torch_internals.status(), ids=lambda status: status.name)
def test_every_private_api_exists_in_this_torch(status):
    assert status.moved is None, f"{status.name}: {status.moved}. Without it {status.without}"
    assert status.what
    assert status.without


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_private_names_of_torch_are_used_in_one_package(path):
    found = {name for name in dotted_names(ast.parse(path.read_text())) if is_private(name)} - PUBLIC
    assert not found


def dotted_names(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            parts = [node.attr]
            while isinstance(node := node.value, ast.Attribute):
                parts.append(node.attr)
            if isinstance(node, ast.Name):
                yield ".".join([node.id, *reversed(parts)])


def is_private(name):
    parts = name.split(".")
    return parts[0] == "torch" and any(p.startswith("_") and not p.startswith("__") for p in parts)


def test_a_moved_name_warns_once_and_the_fallback_is_used(recwarn):
    def native(x):
        """Return x."""
        raise AttributeError("gone")

    one = torch_internals.Need(native, lambda x: x + 1, ("torch._gone",), "it is slower")
    assert [one(1), one(2)] == [2, 3]
    assert len(recwarn) == 1
    assert "has moved one of torch._gone (AttributeError: gone): it is slower" in str(recwarn[0].message)


RUN_WITHOUT = """
import sys, warnings
warnings.filterwarnings("error")
warnings.filterwarnings("ignore", "torch .* has moved one of", RuntimeWarning)
warnings.filterwarnings("ignore", "backend xlstm found no xLSTM", UserWarning)  # without Dynamo.s frame it finds none
warnings.filterwarnings("ignore", category=DeprecationWarning)
from torch_xlstm_ops.runtime.torch_internals.need import NEEDS  # the operators are registered by now
import torch
from tests import oracle
from torch_xlstm_ops import explain, mlstm_chunkwise, mlstm_step, mlstm_step_, slstm_sequence
from torch_xlstm_ops.runtime import torch_internals

error = {"ImportError": ImportError, "AttributeError": AttributeError, "TypeError": TypeError}[sys.argv[1]]
gone = sys.argv[2:] or list(NEEDS)
for name in gone:
    def native(*args, **kwargs):
        raise error("gone")
    NEEDS[name].native = native
torch.set_num_threads(1)

args = [t.requires_grad_() for t in oracle.draw(oracle.Sizes(S=20), torch.float32)]
h, state = mlstm_chunkwise(*args, chunk_size=16)
wide = [t.detach().double().requires_grad_() for t in args]
wanted = oracle.exact(wide)
oracle.assert_close([h, *state], wanted, 1e-5)
found = torch.autograd.grad(oracle.weigh([h, *state]), args)
oracle.assert_close(found, torch.autograd.grad(oracle.weigh(wanted), wide), 1e-4)
q, k, v, igate, fgate, *states = [t.detach() for t in args]
token = [q[:, :, 0], k[:, :, 0], v[:, :, 0], igate[:, :, :1], fgate[:, :, :1], *states]
for _ in range(3):
    h, state = mlstm_step(*token)
with torch.autocast("cpu", dtype=torch.bfloat16):
    assert mlstm_step(*token)[0].dtype == torch.bfloat16
torch.testing.assert_close(mlstm_step_(*token), h)
torch.testing.assert_close(token[5], state.c)
x, r, b = torch.randn(2, 5, 4, 2, 4), torch.randn(4, 2, 4, 4), torch.randn(4, 2, 4)
slstm_sequence(x, r, b)
torch.func.jvp(lambda x: slstm_sequence(x, r, b)[0], (x,), (x,))

from torch_xlstm_ops.models import DEMO_MODEL
from torch_xlstm_ops.cli.shared.loading import load
from torch_xlstm_ops.patch import patch
model = load(DEMO_MODEL, torch.device("cpu")).model
model.backbone.blocks = model.backbone.blocks[:1]
ids = torch.arange(9)[None]
with torch.no_grad():
    wanted = model(ids).logits
    with patch("transformers"):
        torch.testing.assert_close(model(ids).logits, wanted, atol=1e-4, rtol=1e-4)
        model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    torch.testing.assert_close(torch.compile(model, backend="xlstm")(ids).logits, wanted, atol=1e-4, rtol=1e-4)
    assert "xlstm" in explain(model, ids)
from torch_xlstm_ops.ops.table import OPERATORS
from torch_xlstm_ops.registrations import decompositions
for operator in OPERATORS.values():
    decompositions.register(operator)
with torch._subclasses.FakeTensorMode() as mode:
    mlstm_step(*map(mode.from_tensor, token))
# What the calls above do not reach where the others are gone too.
with torch_internals.OperatorMode(lambda op, args, kwargs: op(*args, **kwargs)):
    mlstm_step(*token)
torch_internals.reduction_choices(), torch_internals.compiler_missing(), torch_internals.user_stack()
torch_internals.steps_as_one_kernel()
torch_internals.forget_compile_threads()
torch_internals.functional_mode()
torch_internals.copy_all([torch.zeros(2)], [torch.ones(2)])
torch_internals.prepares_graph(torch.device("cpu"))
torch_internals.traced(lambda: (), []), torch_internals.hooks(model), torch_internals.global_hooks()
NEEDS["shape_env"]()
# Nothing was kept, so nothing loads a kept kernel, and nothing was compiled for a GPU.
assert NEEDS["triton_kernel"](None, "") is None
assert torch_internals.put_together(torch_internals.Generated("", {}), "kernel") is None
unused = [name for name in gone if NEEDS[name].moved is None]
assert not unused, unused
"""


@pytest.mark.parametrize("error", ["ImportError", "AttributeError", "TypeError"])
@pytest.mark.slow
def test_operators_backend_and_a_patched_model_run_on_the_fallbacks(error, tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", RUN_WITHOUT, error], capture_output=True, text=True, timeout=600, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert run.returncode == 0, run.stderr
