"""Samples of similar length side by side, so that they share their products.

Letters: T tokens, B samples of a rectangle, L its length.
"""

import functools
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

# Tokens of padding that cost less than a rectangle's launches.
MOST_PADDING = 128
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
            return x[self.samples[0][0] : self.samples[-1][1]].unflatten(0, (len(self.samples), self.length))
        return x.index_select(0, _places(self, x.device).tokens).unflatten(0, (len(self.samples), self.length))

    def take_filled(self, x: Tensor) -> Tensor:
        """As ``take``, with zeros for the padding."""
        if self.whole:
            return self.take(x)
        taken = self.take(x)
        taken.flatten(0, 1).index_fill_(0, _places(self, x.device).padding, 0)
        return taken

    def rows(self, part: Tensor) -> Tensor:
        """``[B, L, ...]`` to the tokens in it that are no padding, ``[n, ...]``."""
        flat = part.flatten(0, 1)
        return flat if self.whole else flat.index_select(0, _places(self, part.device).real)

    def room(self, x: Tensor) -> Tensor:
        """Where to write what belongs into the rectangle's tokens of ``x``, ``[B, L, ...]``, before ``put``."""
        return self.take(x) if self.whole else x.new_empty(len(self.samples), self.length, *x.shape[1:])

    def put(self, x: Tensor, part: Tensor) -> None:
        """Bring what was written into ``room`` to its tokens in ``x``."""
        if not self.whole:
            places = _places(self, x.device)
            x.index_copy_(0, places.real_tokens, part.flatten(0, 1).index_select(0, places.real))


@dataclass(frozen=True)
class _Places:
    """A rectangle's places, counted through its rows: LongTensors.

    Args:
        tokens: every place's token; behind a sample's end its last token again.
        real: the places that hold a token of their own.
        real_tokens: these tokens.
        padding: the other places.
    """

    tokens: Tensor
    real: Tensor
    real_tokens: Tensor
    padding: Tensor


@functools.lru_cache(maxsize=64)  # the layers of a step ask for the same ones
def _places(rectangle: Rectangle, device: torch.device) -> _Places:
    starts, ends = torch.tensor(rectangle.samples).unsqueeze(2).unbind(1)  # [B, 1]
    positions = starts + torch.arange(rectangle.length)  # [B, L]
    tokens = torch.minimum(positions, ends - 1).flatten()
    real, padding = ((positions < ends).flatten() == flag for flag in (True, False))
    found = (tokens, real.nonzero().squeeze(1), tokens[real], padding.nonzero().squeeze(1))
    return _Places(*(places.to(device) for places in found))


@functools.lru_cache(maxsize=16)
def rectangles(boundaries: tuple[int, ...], apart: bool = False) -> tuple[Rectangle, ...]:
    """All samples, each in one rectangle; ``boundaries`` are the first token of every sample, then T.

    Short samples share a rectangle until their padding would cost more than the launches that sharing saves, or none
    shares any if they are to stay ``apart``.
    """
    if apart:
        return tuple(Rectangle(((start, end),), end - start) for start, end in pairwise(boundaries) if end > start)
    runs: list[list[tuple[int, int]]] = []
    for start, end in pairwise(boundaries):
        if runs and runs[-1][0][1] - runs[-1][0][0] == end - start:
            runs[-1].append((start, end))
        elif end > start:
            runs.append([(start, end)])

    def length_of(run: list[tuple[int, int]]) -> int:
        return run[0][1] - run[0][0]

    runs.sort(key=length_of, reverse=True)
    groups: list[list[list[tuple[int, int]]]] = []
    waste = 0
    for run in runs:
        longest = length_of(groups[-1][0]) if groups else 0
        waste += (longest - length_of(run)) * len(run)
        if groups and longest < LONE and waste <= MOST_PADDING:
            groups[-1].append(run)
        else:
            groups.append([run])
            waste = 0
    return tuple(Rectangle(tuple(sample for run in group for sample in run), length_of(group[0])) for group in groups)
