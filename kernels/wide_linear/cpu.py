"""A narrow linear layer in float32 over an input of another dtype, in compiled C++.

Letters: N rows, D features, E outputs.
"""

import torch
from torch import Tensor

from ..compiled import CompiledFunction

_forward = CompiledFunction("wide_linear_forward", "pppiii")
_backward = CompiledFunction("wide_linear_backward", "pppppiii")


def wide_linear_forward(x: Tensor, weight: Tensor) -> Tensor:
    """``x W^T`` of ``[N, D]`` and a float32 ``[E, D]``, without a converted copy of x."""
    x, weight = x.contiguous(), weight.contiguous()
    y = weight.new_empty(x.shape[0], weight.shape[0])
    _forward(x.dtype, x, weight, y, *x.shape, weight.shape[0])
    return y


def wide_linear_backward(
    dy: Tensor, x: Tensor, weight: Tensor, needs_dx: bool, needs_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and of the weight, those that are needed."""
    dy, x, weight = dy.contiguous(), x.contiguous(), weight.contiguous()
    dx = torch.empty_like(x) if needs_dx else None
    d_weight = torch.empty_like(weight) if needs_weight else None
    _backward(x.dtype, dy, x, weight, dx, d_weight, *x.shape, weight.shape[0])
    return dx, d_weight
