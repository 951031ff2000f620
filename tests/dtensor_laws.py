"""Laws of sharded calls, each run by two processes: python -m tests.dtensor_laws LAW RANK FILE."""

from __future__ import annotations

import copy
import sys

import torch
import torch.distributed as dist

from tests import branches
from tests.operator_cases import CASES, mlstm_token, ops
from torch_xlstm_ops.patch import patch

WORLD = 2


def close(found, wanted, **how):
    torch.testing.assert_close([t.full_tensor() for t in found], list(wanted), **how)


def sharded(args, axes, how):
    """Distribute arguments by batch, by heads, or streams alone by heads, as `how` says."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (WORLD,))
    places = [getattr(one, "heads" if how == "mixed" else how) for one in axes]
    if how == "mixed":
        places = [place if index < 3 else None for index, place in enumerate(places)]
    return [
        distribute_tensor(t.detach().clone(), mesh, [Replicate() if place is None else Shard(place)])
        for t, place in zip(args, places, strict=False)
    ]


def operators():
    """Results and gradients of sharded calls equal those of whole ones, also where some results have no gradient."""
    from torch_xlstm_ops.ops.table import OPERATORS

    for name, case in CASES.items():
        for how in ("batch", "heads", "mixed"):
            args = [t.requires_grad_() for t in case.args()]
            pieces = [t.requires_grad_() for t in sharded(args, OPERATORS[name].arguments, how)]
            for used in (slice(None), slice(0, 1), slice(1, 2)):
                wanted, found = case.op(*args), case.op(*pieces)
                close(found, wanted)
                if how != "mixed":
                    assert all(t.placements[0].is_shard() for t in found), (name, how)
                gradients = torch.autograd.grad(sum(t.square().sum() for t in wanted[used]), args)
                close(torch.autograd.grad(sum(t.square().sum() for t in found[used]), pieces), gradients)


def options():
    """Masks, missing states and keywords count."""
    from torch_xlstm_ops.ops.table import OPERATORS

    calls = {
        "mlstm_chunkwise": (5, 5, [{"chunk_size": 2}, {"eps": 0.5}]),
        "slstm_sequence": (3, 4, [{"floor": 0.0}, {"floor": 2.0}]),
    }
    for name, (count, S, keywords) in calls.items():
        op, tensors = getattr(ops, name), CASES[name].args()
        B = tensors[0].shape[0]
        reset = torch.arange(B * S).view(B, S) % 3 == 1
        streams, none = tensors[:count], [None] * (len(tensors) - count)
        axes = OPERATORS[name].arguments
        for how in ("batch", "heads"):
            pieces = sharded([*tensors, reset], axes, how)
            first = pieces[:len(streams)]
            for keyword in keywords:
                close(op(*pieces, **keyword), op(*tensors, reset, **keyword))
                close(op(*first, *none, pieces[-1], **keyword), op(*streams, *none, reset, **keyword))
                close(op(*first, **keyword), op(*streams, **keyword))


def in_place():
    """A step in place writes the states where they are, and returns h."""
    from torch_xlstm_ops.ops.table import OPERATORS

    for how in ("batch", "heads", "mixed"):
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                args = mlstm_token()
                pieces = sharded(args, OPERATORS["mlstm_step"].arguments, how)
                places = [t.placements for t in pieces]
                wanted = ops.mlstm_step_(*args)
                close([ops.mlstm_step_(*pieces)], [wanted])
                close(pieces[5:], args[5:])
                assert [t.placements for t in pieces] == places


def fully_sharded():
    """A patched model under FSDP2, each process with its own rows, has the gradients of the whole batch."""
    from torch.distributed.fsdp import fully_shard
    from transformers import xLSTMConfig, xLSTMForCausalLM

    torch.manual_seed(0)
    model = xLSTMForCausalLM(xLSTMConfig(
        vocab_size=32, hidden_size=32, num_hidden_layers=2, num_blocks=2, num_heads=2, qk_dim_factor=1.0,
        mode="train", return_last_states=True,
    ))
    shards, ids = copy.deepcopy(model), torch.arange(4 * 9).view(4, 9) * 7 % 32
    with patch("transformers"):
        model(ids, labels=ids, use_cache=False).loss.backward()
        for block in shards.backbone.blocks:
            fully_shard(block)
        fully_shard(shards)
        mine = ids.chunk(WORLD)[dist.get_rank()]
        shards(mine, labels=mine, use_cache=False).loss.backward()
    wanted = dict(model.named_parameters())
    found = {name: p.grad for name, p in shards.named_parameters()}
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient.full_tensor(), wanted[name].grad, atol=1e-5, rtol=1e-4, msg=name)


def heads_in_parallel():
    """A layer whose projections are sharded by columns and rows runs its heads apart, as the whole layer does."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    B, S, NH, D = 2, 6, 4, 4
    width = NH * D
    mesh = init_device_mesh("cpu", (WORLD,))
    weights = [torch.randn(width, width, dtype=torch.float64) / 4 for _ in range(4)]
    weights += [torch.randn(NH, width, dtype=torch.float64) for _ in range(2)]
    x = torch.randn(B, S, width, dtype=torch.float64)

    def layer(x, wq, wk, wv, wo, wi, wf):
        q, k, v = ((x @ w.T).unflatten(-1, (NH, D)).transpose(1, 2) for w in (wq, wk, wv))
        igate, fgate = ((x @ w.T).transpose(1, 2) for w in (wi, wf))
        h = ops.mlstm_chunkwise(q, k, v, igate, fgate, chunk_size=4, schedule="recurrent")[0]
        return h.transpose(1, 2).flatten(2) @ wo.T

    whole = [t.clone().requires_grad_() for t in weights]
    places = [Shard(0), Shard(0), Shard(0), Shard(1), Shard(0), Shard(0)]
    parts = [distribute_tensor(t, mesh, [p]).requires_grad_() for t, p in zip(weights, places, strict=True)]
    wanted, found = layer(x, *whole), layer(distribute_tensor(x, mesh, [Replicate()]), *parts)
    close([found], [wanted])
    close(torch.autograd.grad(found.square().sum(), parts), torch.autograd.grad(wanted.square().sum(), whole))


def main(law: str, rank: str, file: str) -> None:
    branches.choose()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", store=dist.FileStore(file, WORLD), rank=int(rank), world_size=WORLD)
    try:
        globals()[law]()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
