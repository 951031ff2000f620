"""The Linear layers of a traced block on MPS: those that share an input are one submission.

A token of one row needs no matrix product: the sums over the inputs of all outputs are one generated kernel, which
reads each weight where it is, whatever their number, and what follows is fused into it. Its launch costs a quarter of a
product's. Several rows would read the weights once each: only small weights are then summed.

No form uses `F.linear` with a bias: it is wrong on some Macs (pytorch#188438, pytorch#192934).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

REREAD_BYTES = 1 << 20  # most bytes that the rows but one read again: less than the launch of a product costs


class Projections:
    """The Linear layers of a block, replaced; which of them share an input is seen by running the block once."""

    def __init__(self, block: nn.Module) -> None:
        self._groups: list[tuple[Tensor, list[Projection]]] | None = None  # by input, while the block is observed
        self._shared: dict[Projection, list[Projection]] = {}
        self._found: dict[Projection, Tensor] = {}
        for path, module in [*block.named_modules()]:
            if type(module) is nn.Linear:
                parent, _, name = path.rpartition(".")
                setattr(block.get_submodule(parent), name, Projection(module, self))

    @contextmanager
    def joined(self, run: Callable[[], object]) -> Iterator[None]:
        """Join the layers that `run`, which calls the block, gives the same tensor, in the block's calls inside."""
        self._groups = []
        run()
        self._shared = {layer: layers for _, layers in self._groups for layer in layers}
        self._groups = None
        try:
            yield
        finally:
            self._shared, self._found = {}, {}

    def project(self, layer: Projection, x: Tensor) -> Tensor:
        """Return a layer's result for x (..., K)."""
        if self._groups is not None:
            self._observe(layer, x)
        layers = self._shared.get(layer, [layer])
        if layer not in self._found:
            self._found.update(zip(layers, project(x, layers), strict=True))
        return self._found.pop(layer)

    def _observe(self, layer: Projection, x: Tensor) -> None:
        assert self._groups is not None
        for given, layers in self._groups:
            if given is x:
                layers.append(layer)
                return
        self._groups.append((x, [layer]))


class Projection(nn.Module):
    """A Linear layer's weights, which `Projections` multiplies."""

    def __init__(self, linear: nn.Linear, projections: Projections) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self._projections = projections

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's result."""
        return self._projections.project(self, x)


def project(x: Tensor, layers: Sequence[Projection]) -> list[Tensor]:
    """Return ``x @ weight.T + bias`` of each layer; x: (..., K)."""
    if is_generated(x, layers):
        sizes = {layer.weight.shape[0] for layer in layers}
        return [_sums(x, [layer])[0] for layer in layers] if len(sizes) == 1 else _sums(x, layers)
    rows = x.flatten(0, -2)
    found = [torch.unflatten(torch.mm(rows, layer.weight.T), 0, x.shape[:-1]) for layer in layers]
    return [y if layer.bias is None else y + layer.bias for y, layer in zip(found, layers, strict=True)]


def is_generated(x: Tensor, layers: Sequence[Projection]) -> bool:
    """Return whether the layers are sums in a generated kernel, and no matrix products."""
    rows = math.prod(x.shape[:-1])
    read = sum(layer.weight.numel() * layer.weight.element_size() for layer in layers)
    return isinstance(rows, int) and (rows - 1) * read <= REREAD_BYTES  # a prompt's length is symbolic


def _sums(x: Tensor, layers: Sequence[Projection]) -> list[Tensor]:
    """Return the layers' results, summed in float32.

    Layers of equal sizes that are summed one by one become one kernel, with what follows them.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    weights = [layer.weight for layer in layers]
    sizes = [weight.shape[0] for weight in weights]
    weight = torch.cat(weights) if len(weights) > 1 else weights[0]
    y = (weight.to(wide) * x[..., None, :].to(wide)).sum(-1)
    parts = [part if layer.bias is None else part + layer.bias.to(wide)
             for part, layer in zip(torch.split(y, sizes, -1), layers, strict=True)]
    return [part.to(x.dtype) for part in parts]
