"""Ray on one machine as if on several: one cluster for all tests of a session, which they leave as they found it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest

# More CPUs than there are, for actors mostly wait; ports that are free.
NODE = {"num_cpus": 5, "num_gpus": 0, "object_store_memory": 100 << 20, "dashboard_agent_listen_port": None}


def hide_xlstm() -> None:
    """Have transformers build its xLSTM in a worker as `branches` has it in tests, at no import's cost."""
    if os.environ.get("XLSTM_TEST_BRANCH") != "xlstm":
        sys.modules["xlstm"] = None  # type: ignore[assignment]


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Any]:
    """Yield a `Cluster` of two nodes that the process is connected to."""
    ray = pytest.importorskip("ray", reason="ray is not installed")
    from ray.cluster_utils import Cluster

    from torch_xlstm_ops.schedules.ray import actor_pool

    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    cluster = Cluster()
    try:
        cluster.add_node(**NODE, include_dashboard=False)
        cluster.add_node(**NODE)
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers have no tests
        ray.init(address=cluster.address, namespace=f"xlstm-ops-tests-{os.getpid()}", log_to_driver=False,
                 logging_level="ERROR", runtime_env={"worker_process_setup_hook": hide_xlstm})
        yield cluster
    finally:
        actor_pool.close()
        ray.shutdown()
        cluster.shutdown()
