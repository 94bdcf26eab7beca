"""Autograd for the frozen linear layer plus per-range LoRA."""

from typing import Any

import torch
from torch import Tensor

from .reference import LoraRange, lora_linear_backward, lora_linear_forward


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scalings: tuple[tuple[int, int, float], ...],
        masks: tuple[Tensor | None, ...],
        *factors: Tensor,
    ) -> Tensor:
        ranges = _ranges(scalings, masks, factors)
        y, lowered = lora_linear_forward(x, weight, bias, ranges)
        ctx.save_for_backward(x, weight, *masks, *factors, *lowered)
        ctx.scalings = scalings
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        n = len(ctx.scalings)
        x, weight, *rest = ctx.saved_tensors
        masks, factors, lowered = rest[:n], rest[n : 3 * n], rest[3 * n :]
        ranges = _ranges(ctx.scalings, masks, factors)
        dx, weight_grads = lora_linear_backward(grads[0], x, weight, ranges, lowered, ctx.needs_input_grad[0])
        return dx, None, None, None, None, *(grad for pair in weight_grads for grad in pair)


def _ranges(scalings: tuple[tuple[int, int, float], ...], masks: Any, factors: Any) -> list[LoraRange]:
    return [
        LoraRange(start, end, factors[2 * i], factors[2 * i + 1], scaling, masks[i])
        for i, (start, end, scaling) in enumerate(scalings)
    ]


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, ranges: list[LoraRange]) -> Tensor:
    """A frozen linear layer with a LoRA of its own on each token range.

    The base product runs once over all tokens; a range only ever touches its own rows.

    Args:
        x: ``[T, I]``.
        weight: frozen ``[O, I]``; no gradient is computed for it.
        bias: frozen ``[O]`` or None.
        ranges: disjoint token ranges with their factors. Factors may be of a wider dtype than x: the products run in
            x's dtype, the gradients come back in the factors'.

    Returns:
        ``[T, O]`` in x's dtype.
    """
    if not ranges:
        return torch.nn.functional.linear(x, weight, bias)
    scalings = tuple((part.start, part.end, part.scaling) for part in ranges)
    factors = [factor for part in ranges for factor in (part.lora_a, part.lora_b)]
    result: Tensor = _LoraLinear.apply(x, weight, bias, scalings, tuple(part.mask for part in ranges), *factors)
    return result
