"""Frozen projections of one input plus per-range LoRA in plain PyTorch, forward and backward.

Letters: T tokens, I input features, O output features, J projections, R rank, n tokens of one range.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..products import add_matmul_, linear, matmul, matmul_t

Factors = tuple[Tensor, Tensor]  # lora_a [R, I] and lora_b [O, R]


@dataclass(frozen=True)
class LoraRange:
    """One adapter's token range.

    Args:
        start: first token.
        end: one past the last token.
        factors: ``lora_a [R, I]`` and ``lora_b [O, R]`` of each projection; None where the adapter has none.
        scalings: factor of each projection's low-rank product.
        mask: dropout mask ``[n, I]`` already divided by the keep probability, or None.
    """

    start: int
    end: int
    factors: tuple[Factors | None, ...]
    scalings: tuple[float, ...]
    mask: Tensor | None = None

    def masked(self, x: Tensor) -> Tensor:
        """What the factors read of ``[T, I]``, ``[n, I]``."""
        rows = x[self.start : self.end]
        return rows if self.mask is None else rows * self.mask

    def stacked_a(self, dtype: torch.dtype) -> Tensor:
        """A of all projections, one below the other, ``[sum R, I]``."""
        return torch.cat([pair[0] for pair in self.factors if pair is not None]).to(dtype)

    def columns(self) -> list[slice]:
        """Where each projection's ranks stand in ``stacked_a``; empty where it has none."""
        found, end = [], 0
        for pair in self.factors:
            start, end = end, end + (pair[0].shape[0] if pair is not None else 0)
            found.append(slice(start, end))
        return found

    def scaled_b(self, projection: int, dtype: torch.dtype) -> Tensor:
        """``s B^T`` of a projection that has factors, ``[R, O]``: contiguous, because GEMMs read it fastest so."""
        pair = self.factors[projection]
        assert pair is not None
        return (pair[1].T * self.scalings[projection]).to(dtype, memory_format=torch.contiguous_format)


Gradients = list[list[Factors | None]]  # a range's, a projection's dA and dB


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
    lowered = []
    for part in ranges:
        a = matmul_t(part.masked(x), part.stacked_a(x.dtype))  # [n, sum R]
        for j, columns in enumerate(part.columns()):
            if part.factors[j] is not None:
                outputs[j][part.start : part.end].addmm_(a[:, columns], part.scaled_b(j, x.dtype))
        lowered.append(a)
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
    dx = None
    if needs_dx:
        dx = matmul(d_outputs[0], weights[0])
        for dy, weight in zip(d_outputs[1:], weights[1:], strict=True):
            add_matmul_(dx, dy, weight)
    gradients: Gradients = []
    for part, a in zip(ranges, lowered, strict=True):
        # The narrow operand is transposed for real: oneDNN multiplies it faster so.
        a_rows = a.T.contiguous()  # [sum R, n]
        pieces, d_bs = [], []
        for j, columns in enumerate(part.columns()):
            if part.factors[j] is not None:
                dy = d_outputs[j][part.start : part.end]
                pieces.append(matmul_t(dy, part.scaled_b(j, dtype)))  # [n, R]
                d_bs.append(matmul(a_rows[columns], dy).T)  # [O, R]
        da = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)  # [n, sum R]
        d_stacked_a = matmul(da.T.contiguous(), part.masked(x))  # [sum R, I]
        gradients.append(_split(part, d_stacked_a, d_bs))
        if dx is not None:
            part_dx = dx[part.start : part.end]
            if part.mask is None:
                part_dx.addmm_(da, part.stacked_a(dtype))
            else:
                part_dx.addcmul_(da @ part.stacked_a(dtype), part.mask)
    return dx, gradients


def _split(part: LoraRange, d_stacked_a: Tensor, d_bs: list[Tensor]) -> list[Factors | None]:
    """Each projection's own gradients, in its factors' dtype, contiguous as fused optimizers need them."""
    found: list[Factors | None] = []
    rest = iter(d_bs)
    for pair, scaling, columns in zip(part.factors, part.scalings, part.columns(), strict=True):
        if pair is None:
            found.append(None)
            continue
        d_a = torch.empty_like(pair[0]).copy_(d_stacked_a[columns])
        d_b = torch.empty(pair[1].shape, dtype=pair[1].dtype, device=pair[1].device)
        found.append((d_a, torch.mul(next(rest), scaling, out=d_b)))
    return found
