"""Neighbouring ranges of one make, whose low-rank products are taken together.

What a range costs beside its arithmetic is calls: a dozen in the forward of every projection. With many adapters of few
tokens each that is most of a step. So ranges that differ in nothing but their length are laid side by side, the shorter
ones padded, and each product is one batched call. No range ever meets another's factors.

Letters: T tokens, I input features, O output features, R rank, P ranges of a team, L tokens of the longest, n tokens of
one.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..invariance import is_batch_invariant
from ..products import linear
from ..rectangles import Rectangle
from .ranges import Factors, Gradients, LoraRange

# Up to this many tokens a range's calls cost more than its copy into a rectangle, and than a slower library's product.
FEW = 256
# Padding of a team: this share of its tokens, at most.
MOST_PADDING = 0.75


def product(a: Tensor, b: Tensor) -> Tensor:
    """``[P, n, I]`` times ``[P, I, O]``."""
    return linear(a[0], b[0].mT)[None] if a.shape[0] == 1 else torch.bmm(a, b)


def teams(ranges: Sequence[LoraRange], dtype: torch.dtype) -> Iterator["Team"]:
    """All ranges, in their order."""
    gathered: list[LoraRange] = []
    for part in ranges:
        if gathered and not _takes(gathered, part, dtype):
            yield Team(tuple(gathered))
            gathered = []
        gathered.append(part)
    if gathered:
        yield Team(tuple(gathered))


def _takes(gathered: Sequence[LoraRange], part: LoraRange, dtype: torch.dtype) -> bool:
    """Whether a range may join those before it."""
    last = gathered[-1]
    if is_batch_invariant():
        return False
    if last.end != part.start or last.ranks != part.ranks or (last.mask is None) != (part.mask is None):
        return False
    lengths = [other.end - other.start for other in (*gathered, part)]
    longest, tokens = max(lengths), sum(lengths)
    if min(lengths) == longest and dtype.itemsize == 2:  # oneDNN's; batches of wider types are MKL's, see products
        return longest > 0
    return min(lengths) > 0 and longest <= FEW and longest * len(lengths) <= (1 + MOST_PADDING) * tokens


@dataclass(frozen=True)
class Team:
    """Ranges of one make.

    Args:
        parts: each begins where the one before ends.
    """

    parts: tuple[LoraRange, ...]

    @functools.cached_property
    def _rows(self) -> slice:
        return slice(self.parts[0].start, self.parts[-1].end)

    @functools.cached_property
    def _lengths(self) -> list[int]:
        return [part.end - part.start for part in self.parts]

    @functools.cached_property
    def _rectangle(self) -> Rectangle:
        """Where the parts lie among the team's own rows."""
        ends = itertools.accumulate(self._lengths)
        samples = tuple((end - length, end) for end, length in zip(ends, self._lengths, strict=True))
        return Rectangle(samples, max(self._lengths))

    @functools.cached_property
    def mask(self) -> Tensor | None:
        """The dropout masks, one below the other, ``[n of all, I]``."""
        masks = [part.mask for part in self.parts if part.mask is not None]
        return _below(masks) if masks else None

    def columns(self) -> list[tuple[int, slice]]:
        """The projections that have factors, and where each one's ranks stand in ``stacked_a``."""
        ends = itertools.accumulate(self.parts[0].ranks)
        return [(j, slice(end - r, end)) for j, (end, r) in enumerate(zip(ends, self.parts[0].ranks, strict=True)) if r]

    def take(self, x: Tensor) -> Tensor:
        """The team's rows of ``[T, I]`` side by side, ``[P, L, I]``; behind a range's end stands its last row."""
        return self._rectangle.take(x[self._rows])

    def read(self, x: Tensor) -> Tensor:
        """What the factors read of ``[T, I]``, ``[P, L, I]``."""
        if self.mask is None:
            return self.take(x)
        return self._rectangle.take(x[self._rows] * self.mask)

    def together(self, rows: Sequence[Tensor]) -> Tensor:
        """The rows ``[n, R]`` of each range side by side, zeros behind their ends: ``[P, L, R]``."""
        return self._rectangle.take_filled(_below(rows))

    def apart(self, part: Tensor) -> list[Tensor]:
        """``[P, L, R]`` to the rows ``[n, R]`` of each range, each in memory of its own."""
        rows = self._rectangle.rows(part)
        return [rows] if len(self.parts) == 1 else [own.clone() for own in rows.split(self._lengths)]

    def without_padding(self, part: Tensor) -> Tensor:
        """``[P, L, R]`` with zeros behind each range's end."""
        return part if self._rectangle.whole else self._rectangle.take_filled(self._rectangle.rows(part))

    def add(self, out: Tensor, a: Tensor, b: Tensor, mask: Tensor | None = None) -> None:
        """Add the products ``[P, L, R] [P, R, O]`` to the team's rows of ``[T, O]``, under a mask if there is one."""
        own = out[self._rows]
        if mask is not None:
            own.addcmul_(self._rectangle.rows(product(a, b)), mask)
        elif len(self.parts) == 1:
            own.addmm_(a[0], b[0])
        elif self._rectangle.whole:
            self._rectangle.take(own).baddbmm_(a, b)
        else:
            own.add_(self._rectangle.rows(product(a, b)))

    def stacked_a(self, dtype: torch.dtype) -> Tensor:
        """A of all projections, one below the other, of every range: ``[P, sum R, I]``."""
        factors = [pair[0] for part in self.parts for pair in part.factors if pair is not None]
        return torch.cat(factors).to(dtype).unflatten(0, (len(self.parts), -1))

    def scaled_b(self, projection: int, dtype: torch.dtype) -> Tensor:
        """``s B^T`` of a projection that has factors, ``[P, R, O]``: contiguous, because GEMMs read it fastest so."""
        pairs = [part.factors[projection] for part in self.parts]
        stacked = _below([pair[1] for pair in pairs if pair is not None]).unflatten(0, (len(pairs), -1))  # [P, O, R]
        scaled = stacked.mT * self._scaling(projection, stacked)
        return scaled.to(dtype, memory_format=torch.contiguous_format)

    def _scaling(self, projection: int, like: Tensor) -> Tensor | float:
        scalings = [part.scalings[projection] for part in self.parts]
        return scalings[0] if len(set(scalings)) == 1 else like.new_tensor(scalings).view(-1, 1, 1)

    def split(self, d_stacked_a: Tensor, d_bs: Sequence[Tensor]) -> Gradients:
        """Each factor's own gradient, in its dtype, contiguous as fused optimizers need them.

        Args:
            d_stacked_a: ``[P, sum R, I]``.
            d_bs: ``[P, O, R]`` of each projection that has factors, not scaled yet.
        """
        gradients: Gradients = [[None] * len(part.factors) for part in self.parts]
        own: list[Tensor] = []
        found: list[Tensor] = []
        for (j, columns), d_b in zip(self.columns(), d_bs, strict=True):
            scaled: Sequence[Tensor] = []
            for i, part in enumerate(self.parts):
                pair = part.factors[j]
                assert pair is not None
                scaled = scaled or d_b.to(pair[1].dtype).mul_(self._scaling(j, pair[1])).unbind()
                gradients[i][j] = fresh = _like(pair)
                own += fresh
                found += (d_stacked_a[i, columns], scaled[i])
        torch._foreach_copy_(own, found)
        return gradients


def _like(pair: Factors) -> Factors:
    lora_a, lora_b = pair
    return torch.empty_like(lora_a), torch.empty(lora_b.shape, dtype=lora_b.dtype, device=lora_b.device)


def _below(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
