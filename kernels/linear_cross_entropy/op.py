"""Autograd for the cross-entropy against the frozen head."""

from typing import Any

import torch
from torch import Tensor

from .reference import linear_cross_entropy_forward


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        nll, gradient = linear_cross_entropy_forward(hidden, weight, targets, ctx.needs_input_grad[0])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return nll

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0][:, None].to(gradient.dtype), None, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of every row under a frozen linear head.

    Args:
        hidden: ``[N, D]``; only rows that carry a label, no other row costs anything.
        weight: frozen ``[V, D]``; no gradient is computed for it.
        targets: LongTensor ``[N]`` in ``0..V-1``.

    Returns:
        ``[N]``, float32 (float64 for a float64 base).
    """
    result: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets)
    return result
