"""Where workers run: the resources that each wants, and the placement group that reserves them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch_xlstm_ops.schedules.ray import actor_pool, cluster

RESERVE_SECONDS = 15.0  # in which a cluster must find resources for all workers
STRATEGIES = {"spread": "SPREAD", "pack": "PACK"}  # Ray's names
NODE_LABEL = "ray.io/node-id"


class Placement(NamedTuple):
    """What each worker wants, and where."""

    resource: str  # CPU or GPU
    units: float  # of the resource, for each worker
    strategy: str  # Ray's name
    labels: Mapping[str, str]  # of the nodes

    @property
    def bundle(self) -> dict[str, float]:
        """Return the resources of a worker."""
        return {self.resource: self.units}


def placement(
    device: str, threads: int, gpus: float | None, strategy: str, nodes: Sequence[str] | None,
    labels: Mapping[str, str] | None,
) -> Placement:
    """Return a placement from the arguments of `Workers`; device: the type of the model's. Raises ValueError."""
    if strategy not in STRATEGIES:
        raise ValueError(f"placement must be one of {', '.join(STRATEGIES)}, got {strategy}")
    wanted = dict(labels or {})
    if isinstance(nodes, str) or (nodes is not None and not nodes):
        raise ValueError(f"nodes must be a sequence of Ray's node ids, got {nodes!r}")
    if nodes is not None:
        wanted[NODE_LABEL] = f"in({','.join(nodes)})"
    if device == "cpu":
        if gpus is not None:
            raise ValueError(f"gpus must come with a model on a GPU, got {gpus} and a model on the CPU")
        return Placement("CPU", threads, STRATEGIES[strategy], wanted)
    gpus = 1 if gpus is None else gpus
    if isinstance(gpus, bool) or not isinstance(gpus, (int, float)) or not (0 < gpus <= 1):
        raise ValueError(f"gpus must be a number above 0 and at most 1, got {gpus}")
    return Placement("GPU", gpus, STRATEGIES[strategy], wanted)


def reserve(count: int, wanted: Placement) -> Any:
    """Reserve resources for all workers or for none, so that two callers never each wait for the other's part.

    Returns the placement group. Raises RuntimeError that says what the cluster has.
    """
    from ray.util import placement_group, remove_placement_group

    if cluster.free(wanted.resource) < count * wanted.units:
        actor_pool.release()  # the ray schedule starts its actors again
    selector = [dict(wanted.labels)] * count if wanted.labels else None
    reservation = placement_group([wanted.bundle] * count, strategy=wanted.strategy, bundle_label_selector=selector)
    if not reservation.wait(RESERVE_SECONDS):
        remove_placement_group(reservation)
        raise RuntimeError(_no_room(count, wanted))
    return reservation


def _no_room(count: int, wanted: Placement) -> str:
    free = f"{cluster.free(wanted.resource):g} {wanted.resource}"
    where = f" on nodes with {dict(wanted.labels)}" if wanted.labels else ""
    advice = "use fewer workers"
    if wanted.resource == "GPU":
        advice += ", or gpus= a smaller part of a GPU for each (--worker-gpus)"
    return (f"Ray had no room for {count} workers of {wanted.units:g} {wanted.resource}{where} within "
            f"{RESERVE_SECONDS:g} s: {free} are free; the cluster has {cluster.describe()}; {advice}")
