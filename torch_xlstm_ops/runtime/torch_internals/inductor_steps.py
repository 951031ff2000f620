"""Have Inductor compile a function of many small steps to one kernel.

Inductor decides for each value that several others read whether to store it, and then which loops to merge again. A
function of hundreds of steps takes it many seconds, and may become several kernels. Here each value stays in the loop
that uses it, is computed there once, and one loop writes all parts of a result that joins them.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import fx

from torch_xlstm_ops.runtime.torch_internals.need import need

Index = Sequence[Any]  # an expression for each axis
Load = Callable[[Index], Any]
Place = Callable[[Index], Index]  # from the index of an element of a part to its index in what joins the parts


def _as_inductor_does() -> AbstractContextManager[object]:
    return nullcontext()


@need(_as_inductor_does, where=(
        "torch._inductor.lowering.lowerings", "torch._inductor.lowering.pointwise_cat",
        "torch._inductor.graph.GraphLowering.run_node", "torch._inductor.ir.Pointwise.create",
        "torch._inductor.ir.StorageBox.mark_reuse", "torch._inductor.compile_fx.fake_tensor_prop",
        "torch._guards.detect_fake_mode",
        "torch._inductor.ir.Pointwise.store_output", "torch._inductor.ir.ComputedBuffer",
        "torch._inductor.ir.FixedLayout", "torch._inductor.ir.IRNode.current_origins",
        "torch._inductor.virtualized.V.set_current_node", "torch._inductor.virtualized.V.get_ops_handler",
        "torch.utils._ordered_set.OrderedSet",
    ),
      without="functions of the sLSTM parallel in time take longer to compile, and become more kernels")
def steps_as_one_kernel() -> AbstractContextManager[object]:
    """Return a context in which Inductor compiles functions of this thread to one loop for each result.

    A function must be elementwise but for views. What it returns are steps, all of the same shape, or steps of one
    dtype joined by `torch.cat` of `torch.unsqueeze`, which may be nested.
    """
    return _Steps().changed()


class _Steps:
    """What Inductor does instead, for functions of one thread."""

    def __init__(self) -> None:
        from torch._guards import detect_fake_mode
        from torch._inductor import compile_fx, graph, ir, lowering
        from torch.utils._ordered_set import OrderedSet

        cat = torch.ops.aten.cat.default
        self._thread = threading.get_ident()
        self._lowered: dict[fx.Node, Any] = {}
        self._handlers: list[Any] = []
        self._stores, self._origins, self._fake_mode = _stores(), OrderedSet, detect_fake_mode
        self._join_by_branches: Callable[..., Any] = lowering.pointwise_cat
        changes: list[tuple[Any, str, Callable[..., Any]]] = [
            (graph.GraphLowering, "run_node", self._lower), (ir.StorageBox, "mark_reuse", self._keep_in_loop),
            (compile_fx, "fake_tensor_prop", self._known_shapes),
        ]
        self._patches: list[AbstractContextManager[Any]] = [
            *(mock.patch.object(where, name, self._here(ours, getattr(where, name))) for where, name, ours in changes),
            mock.patch.object(ir.Pointwise, "create", staticmethod(self._here(
                functools.partial(self._create_once, ir.Pointwise.create), ir.Pointwise.create
            ))),
            mock.patch.dict(lowering.lowerings, {cat: self._here(self._join, lowering.lowerings[cat])}),
        ]

    @contextmanager
    def changed(self) -> Iterator[None]:
        with ExitStack() as stack:
            for patch in self._patches:
                stack.enter_context(patch)
            yield

    def _here(self, ours: Callable[..., Any], theirs: Callable[..., Any]) -> Callable[..., Any]:
        """Return what calls `ours` in this thread, and `theirs` in others."""
        def call(*args: Any, **named: Any) -> Any:
            return (ours if threading.get_ident() == self._thread else theirs)(*args, **named)

        return call

    def _lower(self, graph: Any, node: fx.Node) -> Any:
        """Lower a node, without deciding whether to store its value."""
        from torch._inductor import ir
        from torch._inductor.virtualized import V

        origins = ir.IRNode.current_origins(self._origins([node]))
        with origins, graph.set_current_node(node), V.set_current_node(node):
            self._lowered[node] = fx.Interpreter.run_node(graph, node)
        return self._lowered[node]

    def _keep_in_loop(self, *args: Any, **named: Any) -> None:
        """Do not store what is read several times."""

    def _known_shapes(self, traced: fx.GraphModule, examples: Sequence[Any], *rest: Any) -> Any:
        """Keep the shapes that tracing found: to compute them again takes as long as tracing."""
        return self._fake_mode(examples)

    def _create_once(self, create: Callable[..., Any], *, inner_fn: Load, **given: Any) -> Any:
        return create(inner_fn=_once(inner_fn, self._handlers), **given)

    def _join(self, tensors: Sequence[Any], dim: int = 0) -> Any:
        """Lower a join: a result to one buffer; what a step reads to a branch for each tensor."""
        from torch._inductor.virtualized import V

        node = V.current_node
        if all(user.op == "output" for user in node.users):
            return _joined(self._stores, node, [(self._lowered[part], place) for part, place in _parts(node, list)])
        return self._join_by_branches(tensors, dim % len(tensors[0].get_size()))


def _once(load: Load, handlers: list[Any]) -> Load:
    """Return what evaluates `load` once for each index while a body is evaluated.

    handlers: of operations; there is one for each evaluation of a body, and for each branch in it. They are kept, so
    that none has the identity of an earlier one.
    """
    from torch._inductor.virtualized import V

    values: dict[tuple[int, tuple[Any, ...]], Any] = {}

    def loaded(index: Index) -> Any:
        handler = V.get_ops_handler()
        key = id(handler), tuple(index)
        if key not in values:
            handlers.append(handler)
            values[key] = load(index)
        return values[key]

    return loaded


def _joined(stores: Any, node: fx.Node, parts: Sequence[tuple[Any, Place]]) -> Any:
    """Return the buffer of what a node joins; a loop over the axes of a part writes each part to its place."""
    from torch._inductor import ir
    from torch._inductor.virtualized import V

    first = parts[0][0]
    loop = stores(
        device=first.get_device(), dtype=first.get_dtype(), inner_fn=first.make_loader(), ranges=first.get_size(),
        parts=[(part.make_loader(), place) for part, place in parts],
    )
    size = [s.node.expr if isinstance(s, torch.SymInt) else s for s in node.meta["val"].shape]
    buffer = ir.ComputedBuffer(name=None, layout=ir.FixedLayout(loop.device, loop.dtype, size), data=loop)
    buffer.name = V.graph.register_buffer(buffer)
    V.graph.register_operation(buffer)
    return ir.TensorBox.create(buffer)


def _parts(node: fx.Node, place: Place) -> Iterator[tuple[fx.Node, Place]]:
    """Yield what a node joins, and what that joins in turn, each with its place in the result."""
    aten = torch.ops.aten
    args: Any = node.args
    if node.target is aten.cat.default:
        dim, at = (args[1] if len(args) > 1 else 0) % node.meta["val"].dim(), 0
        for part in args[0]:
            yield from _parts(part, functools.partial(_moved, place, dim, at))
            at += part.meta["val"].shape[dim]
    elif node.target is aten.unsqueeze.default:
        yield from _parts(args[0], functools.partial(_with_axis, place, args[1] % node.meta["val"].dim()))
    else:
        yield node, place


def _moved(place: Place, dim: int, by: Any, index: Index) -> Index:
    return place([*index[:dim], index[dim] + by, *index[dim + 1:]])


def _with_axis(place: Place, dim: int, index: Index) -> Index:
    return place([*index[:dim], 0, *index[dim:]])


def _stores() -> Any:
    """Return the class of a loop that writes several values, each to a place of its own in one buffer."""
    from torch._inductor import ir
    from torch._inductor.virtualized import ops

    store: Callable[..., Any] = ops.store

    @dataclasses.dataclass(frozen=True)
    class Stores(ir.Pointwise):
        parts: Sequence[tuple[Load, Place]]

        def store_output(self, output_name: str | None, indexer: Callable[[Index], Any], vars: Index) -> Any:
            for load, place in self.parts:
                last = store(output_name or "unnamed", indexer(place(vars)), load(vars))
            return last

    return Stores
