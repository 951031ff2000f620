"""sLSTM mathematics: the step, a block of steps and its gradient, and the recurrent oracle.

Gates are pre-activations in the order i f z o: ``g = x_t + R y + b`` per head. A state (y, c, n, m) stands for
``c * exp(m)``, ``n * exp(m)``; a cell with n = 0 holds nothing and its m has no meaning. Inside a block time is the
first axis: x (T, B, 4, NH, DH). Source: Beck et al. 2024, "xLSTM" (sLSTM, stabilised form).

The backward pass has y from the forward pass (it is h), so `recurrent_products` computes every R y in one matrix
product over time. `activate_` computes the gates of all tokens at once, `replay_` recomputes the cell states step by
step, and `block_backward_` runs back through time without an exponential. The gradients of R and b are sums over time
(`weight_gradients`).

A function whose name ends in _ writes its results into its arguments. None writes over an argument that a matrix
product or a reduction reads: in a compiled kernel other threads may still be reading it.
"""

from collections.abc import Callable

from torch import Tensor

from torch_xlstm_ops.maths.slstm.cell import Product, recurrent, step
from torch_xlstm_ops.maths.slstm.gradient import block_backward_, operand_gradient, weight_gradients
from torch_xlstm_ops.maths.slstm.sequence import (
    activate_,
    block_,
    recurrent_products,
    replay_,
    weights,
    weights_backward,
)

__all__ = [
    "AXES",
    "Product",
    "activate_",
    "axes",
    "block_",
    "block_backward_",
    "operand_gradient",
    "recurrent",
    "recurrent_products",
    "replay_",
    "step",
    "weight_gradients",
    "weights",
    "weights_backward",
]

_CELLS, _TOKENS, _GATES, _BIAS, _RESET = "G NH DH", "T G NH DH", "T G 4 NH DH", "4 NH DH", "T G"
_WEIGHTS = {  # the axes of R, for its placeholder in AXES
    Product.MATMUL: {"R": "NH K N", "R backward": "NH N K"},
    Product.FUSED: dict.fromkeys(("R", "R backward"), "4 NH DH DH"),
}
# The functions that are compiled, with the axes of their arguments; `axes` fills in those of R and of a mask.
AXES = {
    step: ("G 4 NH DH", "R", _BIAS, *[_CELLS] * 4),
    block_: (_GATES, "R", _BIAS, *[_CELLS] * 4, _TOKENS, *[_CELLS] * 4),
    activate_: ("G 4 NH DH", "G NH 4 DH", _BIAS, *[_CELLS] * 5),
    replay_: (*[_TOKENS] * 3, *[_CELLS] * 3, *[_TOKENS] * 2),
    block_backward_: (*[_TOKENS] * 10, "R backward", *[_CELLS] * 7, *[_TOKENS] * 4, *[_CELLS] * 3),
}


def axes(fn: Callable[..., tuple[Tensor, ...]], product: Product, reset: bool) -> tuple[str, ...]:
    """Return the axes of the arguments of a compiled function; the batch axis, G, stays symbolic."""
    filled = tuple(_WEIGHTS[product].get(names, names) for names in AXES[fn])
    return (*filled, _RESET) if reset else filled
