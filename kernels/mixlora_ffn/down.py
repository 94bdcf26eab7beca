"""What the down projection's experts add behind the frozen product, and its gradients.

Letters: T tokens, P parts, D model, E experts, K top-k, R rank, ER all of an adapter's experts' ranks side by side.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..compiled import runs_compiled
from ..parts import columns_by_part, times, transposed_times
from ..registration import Differentiable, Gradients, Operator
from .cpu_model import ModelPart, ModelProducts
from .model_products import joined

_ARGUMENTS = "Tensor lowered, Tensor[] factors, Tensor experts, SymInt[] lengths, float[] scalings"


def _forward(
    lowered: Tensor, factors: Sequence[Tensor], experts: Tensor, lengths: Sequence[int], scalings: Sequence[float]
) -> Tensor:
    if runs_compiled(lowered):
        return _products(lowered, factors, experts, lengths, scalings).raise_(lowered)
    return times(lowered, _flat(factors, scalings, lowered.dtype), lengths)


def _backward(
    dy: Tensor,
    lowered: Tensor,
    factors: Sequence[Tensor],
    experts: Tensor,
    lengths: Sequence[int],
    scalings: Sequence[float],
) -> list[Tensor]:
    """Of ``lowered``, then of each factor."""
    if runs_compiled(lowered):
        products = _products(lowered, factors, experts, lengths, scalings)
        (d_lowered,) = products.lower(dy)
        found = products.outer(lowered, dy)[:, 0]  # [P, E, D, R]
    else:
        d_lowered = times(dy, _flat(factors, scalings, dy.dtype).transpose(1, 2), lengths)
        columns = columns_by_part(lowered, None, lowered.shape[1], lengths)
        flat = transposed_times(columns, dy, lengths)  # [P, ER, D]
        found = flat.unflatten(1, (factors[0].shape[0], -1)).transpose(2, 3)
    return [
        d_lowered,
        *(
            torch.empty_like(factor, memory_format=torch.contiguous_format).copy_(own).mul_(scaling)
            for own, factor, scaling in zip(found, factors, scalings, strict=True)
        ),
    ]


def _products(
    lowered: Tensor, factors: Sequence[Tensor], experts: Tensor, lengths: Sequence[int], scalings: Sequence[float]
) -> ModelProducts:
    parts = [
        ModelPart(length, [factor.detach()], scaling=scaling)
        for length, factor, scaling in zip(lengths, factors, scalings, strict=True)
    ]
    return ModelProducts(experts, parts, lowered.dtype, is_turned=True)


def _flat(factors: Sequence[Tensor], scalings: Sequence[float], dtype: torch.dtype) -> Tensor:
    """``s B^T`` of all experts, ``[P, ER, D]``."""
    turned = [factor.mul(scaling).transpose(1, 2) for factor, scaling in zip(factors, scalings, strict=True)]
    return joined(turned, dtype).view(len(factors), -1, factors[0].shape[1])


def _differentiate(
    backward: Callable[..., list[Tensor]], kept: Sequence[Any], needs: Sequence[bool], grads: Gradients
) -> tuple[Any, ...]:
    d_lowered, *d_factors = backward(grads[0], *kept)
    return d_lowered, d_factors


_down = Differentiable(
    Operator(
        f"mixlora_down({_ARGUMENTS}) -> Tensor",
        _forward,
        lambda lowered, factors, *_: lowered.new_empty(lowered.shape[0], factors[0].shape[1]),
    ),
    Operator(
        f"mixlora_down_backward(Tensor dy, {_ARGUMENTS}) -> Tensor[]",
        _backward,
        lambda dy, lowered, factors, *_: [torch.empty_like(like) for like in (lowered, *factors)],
    ),
    num_differentiated=2,
    save=lambda arguments, results: arguments,
    differentiate=_differentiate,
)


def mixlora_down(
    lowered: Tensor, factors: Sequence[Tensor], experts: Tensor, lengths: Sequence[int], scalings: Sequence[float]
) -> Tensor:
    """``s sum_e B_e C_e`` of every token, over the experts that it chose.

    Args:
        lowered: C ``[T, ER]``, zeros at the ranks of experts that a token did not choose.
        factors: each part's B, ``[E, D, R]``.
        experts: LongTensor ``[T, K]``.
        lengths: each part's number of tokens.
        scalings: each part's s.

    Returns:
        ``[T, D]``.
    """
    result: Tensor = _down(lowered, list(factors), experts, list(lengths), list(scalings))
    return result
