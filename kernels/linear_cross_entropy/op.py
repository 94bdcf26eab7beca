"""Autograd for the cross-entropy against the frozen head."""

from typing import Any

import torch
from torch import Tensor

from . import reference


@torch.library.custom_op("moe_peft::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    if hidden.is_cuda and hidden.dtype != torch.float64:
        from .kernel import linear_cross_entropy_forward

        return linear_cross_entropy_forward(hidden, weight, targets, with_gradient)
    return reference.linear_cross_entropy_forward(hidden, weight, targets, with_gradient)


@torch.library.custom_op("moe_peft::linear_cross_entropy_backward", mutates_args=())
def _linear_cross_entropy_backward(d_nll: Tensor, gradient: Tensor) -> Tensor:
    return gradient * d_nll[:, None].to(gradient.dtype)


@_linear_cross_entropy.register_fake
def _(hidden: Tensor, weight: Tensor, targets: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    rows = hidden.shape[0] if with_gradient else 0
    return hidden.new_empty(hidden.shape[0], dtype=wide), hidden.new_empty(rows, hidden.shape[1])


@_linear_cross_entropy_backward.register_fake
def _(d_nll: Tensor, gradient: Tensor) -> Tensor:
    return torch.empty_like(gradient)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    gradient = output[1]
    ctx.mark_non_differentiable(gradient)
    ctx.save_for_backward(gradient)


def _differentiate(ctx: Any, d_nll: Tensor, _: Tensor) -> tuple[Tensor | None, None, None, None]:
    (gradient,) = ctx.saved_tensors
    return _linear_cross_entropy_backward(d_nll, gradient), None, None, None


_linear_cross_entropy.register_autograd(_differentiate, setup_context=_save)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of every row under a frozen linear head.

    The gradient of the rows is computed with the losses, while a chunk's logits are at hand, and is all that is saved.

    Args:
        hidden: ``[N, D]``; only rows that carry a label, no other row costs anything.
        weight: frozen ``[V, D]``; no gradient is computed for it.
        targets: LongTensor ``[N]`` in ``0..V-1``.

    Returns:
        ``[N]``, float32 (float64 for a float64 base).

    Raises:
        ValueError: when the shapes do not fit each other.
    """
    if hidden.shape[1:] != weight.shape[1:] or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"hidden {list(hidden.shape)}, weight {list(weight.shape)} and targets {list(targets.shape)} "
            "must be [N, D], [V, D] and [N]"
        )
    with_gradient = hidden.requires_grad and torch.is_grad_enabled()
    nll: Tensor = _linear_cross_entropy(hidden, weight, targets, with_gradient)[0]
    return nll
