"""Frozen linear layer plus per-range LoRA in plain PyTorch, forward and backward.

Letters: T tokens, I input features, O output features, R rank, n tokens of one range.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LoraRange:
    """One adapter's token range.

    Args:
        start: first token.
        end: one past the last token.
        lora_a: ``[R, I]``.
        lora_b: ``[O, R]``.
        scaling: factor of the low-rank product.
        mask: dropout mask ``[n, I]`` already divided by the keep probability, or None.
    """

    start: int
    end: int
    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    mask: Tensor | None = None


def lora_linear_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, ranges: list[LoraRange]
) -> tuple[Tensor, list[Tensor]]:
    """``y = W x + b`` everywhere and ``+ s B A (m * x)`` on each range.

    Returns:
        y ``[T, O]`` and, for backward, each range's ``A (m * x)`` ``[n, R]``.
    """
    y = torch.nn.functional.linear(x, weight, bias)  # [T, O]
    lowered = []
    for part in ranges:
        a = _masked(x[part.start : part.end], part.mask) @ part.lora_a.to(x.dtype).T  # [n, R]
        y[part.start : part.end].addmm_(a, part.lora_b.to(x.dtype).T, alpha=part.scaling)
        lowered.append(a)
    return y, lowered


def lora_linear_backward(
    dy: Tensor, x: Tensor, weight: Tensor, ranges: list[LoraRange], lowered: list[Tensor], needs_dx: bool
) -> tuple[Tensor | None, list[tuple[Tensor, Tensor]]]:
    """Gradients of the forward.

    Returns:
        dx ``[T, I]`` (None unless needed) and ``(dA, dB)`` of each range, in the dtype of A and B.
    """
    dx = dy @ weight if needs_dx else None
    weight_grads = []
    for part, a in zip(ranges, lowered, strict=True):
        part_dy = dy[part.start : part.end]
        da = (part_dy @ part.lora_b.to(dy.dtype)).mul_(part.scaling)  # [n, R]
        # oneDNN takes the narrow operand transposed three times faster than the wide one.
        d_lora_b = (a.T @ part_dy).T.to(part.lora_b.dtype).mul_(part.scaling)
        d_lora_a = (da.T @ _masked(x[part.start : part.end], part.mask)).to(part.lora_a.dtype)
        weight_grads.append((d_lora_a, d_lora_b))
        if dx is not None:
            part_dx = dx[part.start : part.end]
            if part.mask is None:
                part_dx.addmm_(da, part.lora_a.to(dy.dtype))
            else:
                part_dx.addcmul_(da @ part.lora_a.to(dy.dtype), part.mask)
    return dx, weight_grads


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask
