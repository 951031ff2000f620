"""The table of packages that we can patch: one module of this folder each.

A package is known by its import name. A fork under another pip name counts as the package while it passes our checks.
"""

from __future__ import annotations

from typing import NamedTuple


class Upstream(NamedTuple):
    """A package that we can patch."""

    drop_in: str  # our module, imported on demand
    distribution: str  # its pip name
    minimum: tuple[int, int]  # the oldest release that we tested
    newest: tuple[int, int]  # the newest release that we tested
    trigger_module: str  # its module after whose import everything that we replace is defined

    @property
    def requirement(self) -> str:
        """The argument of ``pip install``."""
        return f"{self.distribution}>={self.minimum[0]}.{self.minimum[1]}"

    @property
    def tested(self) -> str:
        """The releases that we tested."""
        oldest, newest = (".".join(map(str, version)) for version in (self.minimum, self.newest))
        return oldest if oldest == newest else f"{oldest} to {newest}"


_HERE = "torch_xlstm_ops.patch.upstream"
PACKAGES = {
    "transformers": Upstream(f"{_HERE}.transformers", "transformers", (5, 17), (5, 24),
                         "transformers.models.xlstm.modeling_xlstm"),
    "mlstm_kernels": Upstream(f"{_HERE}.mlstm_kernels", "mlstm_kernels", (2, 0), (2, 0),
                          "mlstm_kernels.torch.backend_module"),
    "xlstm": Upstream(f"{_HERE}.xlstm", "xlstm", (2, 0), (2, 0), "xlstm"),
    "flashrnn": Upstream(f"{_HERE}.flashrnn", "flashrnn", (1, 0), (1, 0), "flashrnn"),
    "tirex": Upstream(f"{_HERE}.tirex", "tirex-ts", (1, 4), (1, 4), "tirex"),
    "tirex2": Upstream(f"{_HERE}.tirex2", "tirex-2", (0, 4), (0, 4), "tirex2"),
    "pytorch_forecasting": Upstream(f"{_HERE}.pytorch_forecasting", "pytorch-forecasting", (1, 5), (1, 8),
                                    "pytorch_forecasting.layers._recurrent._mlstm.layer"),
}  # by import name

# Packages with an xLSTM by another way, by import name: what becomes of it.
OTHERS = {
    "neuralforecast": "its xLSTM is built of xlstm's blocks, and runs on ours where xlstm does",
    "pytorch_forecasting": "sLSTM cells not touched: they normalise their gates, which no operator computes",
}
