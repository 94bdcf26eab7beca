"""Autograd for frozen linear layers of one input."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..optional_tensors import with_gaps, without_gaps
from ..products import linear, summed_matmuls
from ..registration import Differentiable, Gradients, Operator


def _forward(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], present: Sequence[bool]) -> list[Tensor]:
    return [linear(x, *layer) for layer in zip(weights, with_gaps(biases, present), strict=True)]


def _differentiate(
    backward: Callable[..., Tensor], kept: Sequence[Any], needs: Sequence[bool], grads: Gradients
) -> list[Tensor]:
    reached = [(dy, weight) for dy, weight in zip(grads, kept[0], strict=True) if dy is not None]
    return [backward([dy for dy, _ in reached], [weight for _, weight in reached])]


_frozen_linears = Differentiable(
    Operator(
        "frozen_linears(Tensor x, Tensor[] weights, Tensor[] biases, bool[] present) -> Tensor[]",
        _forward,
        fake=lambda x, weights, *_: [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights],
    ),
    Operator(
        "frozen_linears_backward(Tensor[] d_outputs, Tensor[] weights) -> Tensor",
        summed_matmuls,
        fake=lambda d_outputs, weights: d_outputs[0].new_empty(d_outputs[0].shape[0], weights[0].shape[1]),
    ),
    num_differentiated=1,
    save=lambda arguments, results: [list(arguments[1])],
    differentiate=_differentiate,
)


def frozen_linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """``x W_j^T + b_j`` of which the backward keeps nothing but the weights; it adds up dx inside the products.

    Args:
        x: ``[T, I]``.
        weights: frozen ``[O_j, I]``; no gradient is computed for them.
        biases: frozen ``[O_j]`` or None, of each weight.

    Returns:
        ``[T, O_j]`` of each weight.
    """
    return list(_frozen_linears(x, list(weights), *without_gaps(biases)))


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The one output of :func:`frozen_linears` of a single weight."""
    return frozen_linears(x, [weight], [bias])[0]
