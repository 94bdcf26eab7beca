"""Autograd for the cross-entropy against the frozen head."""

import torch
from torch import Tensor

from ..compiled import runs_compiled
from ..registration import Differentiable, Operator, runs_kernel
from . import cpu, reference


def _forward(hidden: Tensor, weight: Tensor, targets: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor]:
    if runs_kernel(hidden):
        from .kernel import linear_cross_entropy_forward

        return linear_cross_entropy_forward(hidden, weight, targets, with_gradient)
    chosen = cpu if runs_compiled(hidden) else reference
    return reference.in_chunks(hidden, weight, targets, with_gradient, chosen.cross_entropy_rows)


def _forward_fake(hidden: Tensor, weight: Tensor, targets: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    rows = hidden.shape[0] if with_gradient else 0
    return hidden.new_empty(hidden.shape[0], dtype=wide), hidden.new_empty(rows, hidden.shape[1])


_linear_cross_entropy = Differentiable(
    Operator(
        "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor targets, bool with_gradient) -> (Tensor, Tensor)",
        _forward,
        _forward_fake,
    ),
    Operator(
        "linear_cross_entropy_backward(Tensor d_nll, Tensor gradient) -> Tensor",
        lambda d_nll, gradient: gradient * d_nll[:, None].to(gradient.dtype),
        fake=lambda d_nll, gradient: torch.empty_like(gradient),
    ),
    num_differentiated=1,
    save=lambda arguments, results: results[1:],
    differentiate=lambda backward, kept, needs, grads: [backward(grads[0], *kept)],
    constants=(1,),
)


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
    if targets.dtype != torch.int64:
        raise ValueError(f"targets must be of torch.int64, not {targets.dtype}")
    with_gradient = hidden.requires_grad and torch.is_grad_enabled()
    nll: Tensor = _linear_cross_entropy(hidden, weight, targets, with_gradient)[0]
    return nll
