"""Frozen projections of one input plus per-range LoRA in plain PyTorch, forward and backward.

Letters: T tokens, I input features, O output features, J projections, R rank, P ranges of a team, n tokens of one range
or team.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..parts import add_times_, columns_by_part, times, transposed_times
from ..products import add_matmul_, linear, matmul

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

    @property
    def ranks(self) -> tuple[int, ...]:
        """Of each projection; 0 where it has no factors."""
        return tuple(0 if pair is None else pair[0].shape[0] for pair in self.factors)


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
    lowered: list[Tensor] = []
    for team in _teams(ranges):
        a = times(team.masked(x), team.stacked_a(x.dtype).mT, team.lengths)  # [n, sum R]
        for j, columns in team.columns():
            add_times_(outputs[j][team.rows], a[:, columns], team.scaled_b(j, x.dtype), team.lengths)
        lowered += [a] if len(team.parts) == 1 else [own.clone() for own in a.split(team.lengths)]
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
    rest = iter(lowered)
    for team in _teams(ranges):
        a = _below([next(rest) for _ in team.parts])
        # The narrow operand is transposed for real: oneDNN multiplies it faster so.
        a_columns = columns_by_part(a, None, a.shape[1], team.lengths)  # [sum R, n], or [P, sum R, n / P]
        pieces, d_bs = [], []
        for j, columns in team.columns():
            dy, d_columns = d_outputs[j][team.rows], a_columns[..., columns, :]
            pieces.append(times(dy, team.scaled_b(j, dtype).mT, team.lengths))  # [n, R]
            d_bs.append(transposed_times(d_columns, dy, team.lengths).mT)  # [P, O, R]
        da = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)  # [n, sum R]
        da_columns = columns_by_part(da, None, da.shape[1], team.lengths)
        gradients += team.split(transposed_times(da_columns, team.masked(x), team.lengths), d_bs)
        if dx is not None:
            team.add_to_dx(dx[team.rows], da)
    return dx, gradients


@dataclass(frozen=True)
class _Team:
    """Neighbouring ranges of one make, whose low-rank products are taken together.

    Args:
        parts: the ranges, each behind the one before.
    """

    parts: Sequence[LoraRange]

    @property
    def rows(self) -> slice:
        """The tokens of all parts."""
        return slice(self.parts[0].start, self.parts[-1].end)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each part."""
        return [part.end - part.start for part in self.parts]

    def columns(self) -> list[tuple[int, slice]]:
        """The projections that have factors, and where each one's ranks stand in ``stacked_a``."""
        ends = list(itertools.accumulate(self.parts[0].ranks))
        return [(j, slice(end - r, end)) for j, (end, r) in enumerate(zip(ends, self.parts[0].ranks, strict=True)) if r]

    @functools.cached_property
    def _mask(self) -> Tensor | None:
        masks = [part.mask for part in self.parts if part.mask is not None]
        return _below(masks) if masks else None

    def masked(self, x: Tensor) -> Tensor:
        """What the factors read of ``[T, I]``, ``[n, I]``."""
        rows = x[self.rows]
        return rows if self._mask is None else rows * self._mask

    def stacked_a(self, dtype: torch.dtype) -> Tensor:
        """A of all projections, one below the other, of every part: ``[P, sum R, I]``."""
        factors = [pair[0] for part in self.parts for pair in part.factors if pair is not None]
        return torch.cat(factors).to(dtype).unflatten(0, (len(self.parts), -1))

    def scaled_b(self, projection: int, dtype: torch.dtype) -> Tensor:
        """``s B^T`` of a projection that has factors, ``[P, R, O]``: contiguous, because GEMMs read it fastest so."""
        pairs = [(part.factors[projection], part.scalings[projection]) for part in self.parts]
        scaled = [pair[1].T * scaling for pair, scaling in pairs if pair is not None]
        together = scaled[0][None] if len(scaled) == 1 else torch.stack(scaled)
        return together.to(dtype, memory_format=torch.contiguous_format)

    def add_to_dx(self, dx: Tensor, da: Tensor) -> None:
        """Add what goes back through A to the team's rows of dx."""
        stacked = self.stacked_a(dx.dtype)
        if self._mask is None:
            add_times_(dx, da, stacked, self.lengths)
        else:
            dx.addcmul_(times(da, stacked, self.lengths), self._mask)

    def split(self, d_stacked_a: Tensor, d_bs: Sequence[Tensor]) -> Gradients:
        """Each factor's own gradient, in its dtype, contiguous as fused optimizers need them.

        Args:
            d_stacked_a: ``[P, sum R, I]``.
            d_bs: ``[P, O, R]`` of each projection that has factors, not scaled yet.
        """
        gradients: Gradients = []
        for i, part in enumerate(self.parts):
            found: list[Factors | None] = [None] * len(part.factors)
            for (j, columns), d_b in zip(self.columns(), d_bs, strict=True):
                pair = part.factors[j]
                assert pair is not None
                d_lora_b = torch.empty(pair[1].shape, dtype=pair[1].dtype, device=pair[1].device)
                torch.mul(d_b[i], part.scalings[j], out=d_lora_b)
                found[j] = torch.empty_like(pair[0]).copy_(d_stacked_a[i, columns]), d_lora_b
            gradients.append(found)
        return gradients


def _teams(ranges: Sequence[LoraRange]) -> Iterator[_Team]:
    """Runs of ranges of one length and make."""
    team: list[LoraRange] = []
    for part in ranges:
        if team and not _fits(team[-1], part):
            yield _Team(team)
            team = []
        team.append(part)
    if team:
        yield _Team(team)


def _fits(before: LoraRange, part: LoraRange) -> bool:
    """Whether a range is of the make of the one that it follows."""
    return (
        before.end == part.start
        and before.end - before.start == part.end - part.start
        and before.ranks == part.ranks
        and (before.mask is None) == (part.mask is None)
    )


def _below(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
