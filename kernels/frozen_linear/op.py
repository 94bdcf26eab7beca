"""Autograd for a frozen linear layer.

Letters: T tokens, I input features, O output features.
"""

from typing import Any

import torch
from torch import Tensor

from ..products import linear, matmul


class _FrozenLinear(torch.autograd.Function):
    """Made of torch's own operations on every device, so that torch.compile looks into it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return matmul(grads[0], weight), None, None


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b`` of which the backward keeps nothing but the weight.

    Args:
        x: ``[T, I]``.
        weight: frozen ``[O, I]``; no gradient is computed for it.
        bias: frozen ``[O]`` or None.

    Returns:
        ``[T, O]``.
    """
    result: Tensor = _FrozenLinear.apply(x, weight, bias) if x.requires_grad else linear(x, weight, bias)
    return result
