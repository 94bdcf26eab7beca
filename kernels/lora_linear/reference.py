"""Frozen projections of one input plus per-range LoRA in plain PyTorch, forward and backward.

Letters: T tokens, I input features, O output features, R rank, P ranges of a team, L tokens of the longest, n of one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..products import linear, summed_matmuls
from .ranges import Gradients, LoraRange
from .teams import product, teams


def lora_linear_forward(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], ranges: Sequence[LoraRange]
) -> tuple[list[Tensor], list[Tensor]]:
    """``y_j = W_j x + b_j`` everywhere and ``+ s B_j A_j (m * x)`` on each range.

    Args:
        x: ``[T, I]``.
        weights: ``[O_j, I]`` of each projection.
        biases: ``[O_j]`` or None, of each projection.
        ranges: disjoint.

    Returns:
        y_j ``[T, O_j]`` of each projection and, for backward, each range's ``A (m * x)`` ``[n, sum R]``.
    """
    outputs = [linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    lowered: list[Tensor] = []
    for team in teams(ranges, x.dtype):
        a = product(team.read(x), team.stacked_a(x.dtype).mT)  # [P, L, sum R]
        for j, columns in team.columns():
            team.add(outputs[j], a[..., columns], team.scaled_b(j, x.dtype))
        lowered += team.apart(a)
    return outputs, lowered


def lora_linear_backward(
    d_outputs: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    ranges: Sequence[LoraRange],
    lowered: Sequence[Tensor],
    needs_dx: bool,
) -> tuple[Tensor | None, Gradients]:
    """Gradients of the forward.

    Args:
        d_outputs: ``[T, O_j]`` of each projection.
        x: as in the forward, and so are weights and ranges.
        weights: see x.
        ranges: see x.
        lowered: from the forward.
        needs_dx: also compute the gradient of x.

    Returns:
        dx ``[T, I]`` (None unless needed) and the factors' gradients in the factors' dtype.
    """
    dtype = x.dtype
    dx = summed_matmuls(d_outputs, weights) if needs_dx else None
    gradients: Gradients = []
    rest = iter(lowered)
    for team in teams(ranges, dtype):
        a = team.together([next(rest) for _ in team.parts])  # [P, L, sum R]
        # The narrow operand is transposed for real: oneDNN multiplies it faster so.
        a_columns = a.mT.contiguous()
        pieces, d_bs = [], []
        for j, columns in team.columns():
            dy = team.take(d_outputs[j])  # [P, L, O]
            pieces.append(product(dy, team.scaled_b(j, dtype).mT))  # [P, L, R]
            d_bs.append(product(a_columns[:, columns], dy).mT)  # [P, O, R]
        da = team.without_padding(pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2))  # [P, L, sum R]
        gradients += team.split(product(da.mT.contiguous(), team.read(x)), d_bs)
        if dx is not None:
            team.add(dx, da, team.stacked_a(dtype), team.mask)
    return dx, gradients
