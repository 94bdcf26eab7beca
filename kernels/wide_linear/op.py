"""Autograd for a narrow linear layer in a wider dtype than its input."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..compiled import runs_compiled
from ..products import matmul, matmul_t
from ..recompute import Recomputable, recomputed
from ..registration import Differentiable, Gradients, Operator
from . import cpu


def _runs_compiled(x: Tensor, weight: Tensor) -> bool:
    return weight.dtype == torch.float32 and runs_compiled(x)


def _forward(x: Tensor, weight: Tensor, recipe: str, kept: Sequence[Tensor]) -> Tensor:
    if _runs_compiled(x, weight):
        return cpu.wide_linear_forward(x, weight)
    return matmul_t(x.to(weight.dtype), weight)


def _backward(
    dy: Tensor, weight: Tensor, recipe: str, kept: Sequence[Tensor], needs_dx: bool, needs_weight: bool
) -> list[Tensor]:
    x = recomputed(recipe, kept)
    if _runs_compiled(x, weight):
        found = cpu.wide_linear_backward(dy, x, weight, needs_dx, needs_weight)
        return [grad for grad in found if grad is not None]
    dx = [matmul(dy, weight).to(x.dtype)] if needs_dx else []
    return [*dx, matmul(dy.T.contiguous(), x.to(weight.dtype))] if needs_weight else dx


def _backward_fake(
    dy: Tensor, weight: Tensor, recipe: str, kept: Sequence[Tensor], needs_dx: bool, needs_weight: bool
) -> list[Tensor]:
    dx = [kept[0].new_empty(dy.shape[0], weight.shape[1])] if needs_dx else []
    return [*dx, weight.new_empty(weight.shape)] if needs_weight else dx


def _save(arguments: Sequence[Any], results: Sequence[Tensor]) -> list[Any]:
    x, weight, recipe, kept = arguments
    return [weight, recipe, kept if recipe else [x]]


def _differentiate(
    backward: Callable[..., list[Tensor]], kept: Sequence[Any], needs: Sequence[bool], grads: Gradients
) -> list[Tensor | None]:
    found = iter(backward(grads[0], *kept, *needs))
    return [next(found) if needed else None for needed in needs]


_wide_linear = Differentiable(
    Operator(
        "wide_linear(Tensor x, Tensor weight, str recipe, Tensor[] kept) -> Tensor",
        _forward,
        fake=lambda x, weight, recipe, kept: weight.new_empty(x.shape[0], weight.shape[0]),
    ),
    Operator(
        "wide_linear_backward(Tensor dy, Tensor weight, str recipe, Tensor[] kept, bool needs_dx, bool needs_weight)"
        " -> Tensor[]",
        _backward,
        _backward_fake,
    ),
    num_differentiated=2,
    save=_save,
    differentiate=_differentiate,
)


def wide_linear(x: Recomputable, weight: Tensor) -> Tensor:
    """``x W^T`` in the weight's dtype, of which the backward keeps no converted copy of x.

    Args:
        x: ``[N, D]``.
        weight: ``[E, D]``, trainable, of x's dtype or a wider one.

    Returns:
        ``[N, E]`` in the weight's dtype.
    """
    result: Tensor = _wide_linear(x.value, weight, x.recipe, x.kept)
    return result
