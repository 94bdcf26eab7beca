"""Autograd for a narrow linear layer in a wider dtype than its input.

Letters: N tokens, D features, E outputs.
"""

from typing import Any

import torch
from torch import Tensor

from ..products import matmul, matmul_t
from ..recompute import Recomputable, recomputed


class _WideLinear(torch.autograd.Function):
    """Made of torch's own operations on every device, so that torch.compile looks into it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, recipe: str, *kept: Tensor) -> Tensor:
        ctx.recipe = recipe
        ctx.save_for_backward(weight, *(kept if recipe else (x,)))
        return matmul_t(x.to(weight.dtype), weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        weight, *kept = ctx.saved_tensors
        x = recomputed(ctx.recipe, kept)
        dx = matmul(grads[0], weight).to(x.dtype) if ctx.needs_input_grad[0] else None
        d_weight = matmul(grads[0].T.contiguous(), x.to(weight.dtype))
        return dx, d_weight, None, *(None for _ in kept if ctx.recipe)


def wide_linear(x: Recomputable, weight: Tensor) -> Tensor:
    """``x W^T`` in the weight's dtype, of which the backward keeps no converted copy of x.

    Args:
        x: ``[N, D]``.
        weight: ``[E, D]``, trainable, of x's dtype or a wider one.

    Returns:
        ``[N, E]`` in the weight's dtype.
    """
    result: Tensor = _WideLinear.apply(x.value, weight, x.recipe, *x.kept)
    return result
