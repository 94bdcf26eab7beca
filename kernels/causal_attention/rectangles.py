"""Samples of similar length side by side, so that they share their products.

Letters: T tokens, B samples of a rectangle, L its length.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

# Lone samples are padded up to a multiple of it.
PAD = 16
# A sample from this length is work enough alone.
LONE = 256


@dataclass(frozen=True)
class Rectangle:
    """Neighbours of one length as they lie, or samples padded behind their ends to one length.

    The padding of a sample is its own last token again: in causal attention nothing before it sees it, and no sample
    ever reads another's tokens.

    Args:
        samples: token range of every sample.
        length: L, of which a sample fills at most all.
    """

    samples: tuple[tuple[int, int], ...]
    length: int

    @property
    def whole(self) -> bool:
        """The rectangle lies in the batch as it is, its samples one behind the other."""
        return self.samples[-1][1] - self.samples[0][0] == len(self.samples) * self.length

    def take(self, x: Tensor) -> Tensor:
        """The rectangle's tokens ``[B, L, ...]`` out of all ``[T, ...]``; a view where it lies there whole."""
        if self.whole:
            return x[self.samples[0][0] : self.samples[-1][1]].unflatten(0, (-1, self.length))
        positions, ends = self._positions(x.device)
        return x[torch.minimum(positions, ends - 1)]

    def take_filled(self, x: Tensor) -> Tensor:
        """As ``take``, with zeros for the padding."""
        if self.whole:
            return self.take(x)
        positions, ends = self._positions(x.device)
        padding = (positions >= ends).view(*positions.shape, *(1,) * (x.dim() - 1))
        return self.take(x).masked_fill_(padding, 0)

    def room(self, x: Tensor) -> Tensor:
        """Where to write what belongs into the rectangle's tokens of ``x``, ``[B, L, ...]``, before ``put``."""
        return self.take(x) if self.whole else x.new_empty(len(self.samples), self.length, *x.shape[1:])

    def put(self, x: Tensor, part: Tensor) -> None:
        """Bring what was written into ``room`` to its tokens in ``x``."""
        if not self.whole:
            positions, ends = self._positions(x.device)
            real = positions < ends
            x[positions[real]] = part[real]

    def _positions(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Token of every place ``[B, L]``, past the sample's end where there is padding, and these ends ``[B, 1]``."""
        starts, ends = torch.tensor(self.samples, device=device).unsqueeze(2).unbind(1)
        return starts + torch.arange(self.length, device=device), ends


def rectangles(boundaries: Sequence[int]) -> list[Rectangle]:
    """All samples, each in one rectangle; ``boundaries`` are the first token of every sample, then T."""
    runs: list[list[tuple[int, int]]] = []
    for start, end in pairwise(boundaries):
        if runs and runs[-1][0][1] - runs[-1][0][0] == end - start:
            runs[-1].append((start, end))
        elif end > start:
            runs.append([(start, end)])
    alike = defaultdict(list)  # runs that one padding makes equally long
    for run in runs:
        length = run[0][1] - run[0][0]
        alike[length if length >= LONE else -(-length // PAD) * PAD].append(run)
    found = []
    for length, runs in alike.items():
        if length >= LONE or len(runs) == 1:
            found += [Rectangle(tuple(run), run[0][1] - run[0][0]) for run in runs]
        else:
            found.append(Rectangle(tuple(sample for run in runs for sample in run), length))
    return found
