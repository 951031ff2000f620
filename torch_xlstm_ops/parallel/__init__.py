"""Prefill a long prompt with several workers, each reading one shard of it; decoding continues in the caller.

    with Workers(model, 4) as workers:
        logits, cache, report = workers.prefill(tokens)

Every worker holds the model. A shard needs only the recurrent state of each layer at its beginning, so that is all that
workers exchange, whatever the length of the prompt.

A worker may wait for the state, compute its shard, and store the state for the next worker: it is then one mLSTM behind
the previous worker in every layer, so waiting costs (workers - 1) mLSTMs in total. With many workers they instead
summarise their shard (the monoid element F, M, dC, dn) while they wait, and store the next state as soon as the
previous one arrives. sLSTM layers have no summary and always wait.
"""

from torch_xlstm_ops.parallel.report import Report
from torch_xlstm_ops.parallel.workers import Prefilled, Workers, prefill

__all__ = ["Prefilled", "Report", "Workers", "prefill"]
