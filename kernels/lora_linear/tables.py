"""Where each range's rows, ranks and factors lie: the integer tables that the segmented LoRA kernels read.

Letters: T tokens, I input features, O output features, J projections, R rank, G ranges.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from .ranges import LoraRange

# Columns of a factor table: start, end, rank, column, width, narrow offset, factor offset, scaling (the bits of a
# float), first chunk, number of chunks.
FIELDS = 10


@dataclass(frozen=True)
class FactorTable:
    """One factor of every range: all A of the range stacked, or B of one projection.

    Args:
        ints: int32 ``[G, FIELDS]``.
        floats: the same memory as float32, for the scaling.
        features: width of what the factor reads or writes on its wide side, I or O_j.
        stacked: whether this is the A of all projections, stored ``[rank, features]``; B is ``[features, rank]``.
        max_rank: largest rank of any range.
        rank_align: largest of 8 and 1 that divides every rank and so every offset into narrow rows.
        offset_align: likewise for every factor's offset.
    """

    ints: Tensor
    floats: Tensor
    features: int
    stacked: bool
    max_rank: int
    rank_align: int
    offset_align: int


@dataclass(frozen=True)
class Tables:
    """All tables of a call.

    Args:
        tiles: int32 ``[tiles, 2]``, a range and its tile's first token.
        chunks: int32 ``[chunks, 3]``, a range and the tokens one partial sum covers; a range's chunks are neighbours.
        a: the factor table of the stacked A.
        b: the factor table of each projection's B.
        tile_tokens: tokens of a tile.
        widths: ranks of each range, all projections side by side.
        narrow_sizes: elements of each range's narrow rows ``[n, sum R]``.
        packed_sizes: elements of each factor: A range by range and projection by projection, then B likewise.
    """

    tiles: Tensor
    chunks: Tensor
    a: FactorTable
    b: tuple[FactorTable, ...]
    tile_tokens: int
    widths: tuple[int, ...]
    narrow_sizes: tuple[int, ...]
    packed_sizes: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """What the tables are made from; plain numbers, so that layers and steps of one layout share their tables."""

    spans: tuple[tuple[int, int], ...]
    ranks: tuple[tuple[int, ...], ...]  # a range's, a projection's; 0 without factors
    scalings: tuple[tuple[float, ...], ...]
    num_tokens: int
    in_features: int
    out_features: tuple[int, ...]
    device: torch.device

    @classmethod
    def of(cls, x: Tensor, weights: Sequence[Tensor], ranges: Sequence[LoraRange]) -> "Layout":
        """The layout of a call's arguments."""
        return cls(
            tuple((part.start, part.end) for part in ranges),
            tuple(tuple(pair[0].shape[0] if pair is not None else 0 for pair in part.factors) for part in ranges),
            tuple(tuple(part.scalings) for part in ranges),
            x.shape[0],
            x.shape[1],
            tuple(weight.shape[0] for weight in weights),
            x.device,
        )


@lru_cache(maxsize=128)
def build_tables(layout: Layout) -> Tables:
    """The tables of a layout, sent to its device in one copy that nobody waits for."""
    lengths = [end - start for start, end in layout.spans]
    widths = [sum(ranks) for ranks in layout.ranks]
    narrow_sizes = [length * width for length, width in zip(lengths, widths, strict=True)]
    tile_tokens = _tile_tokens(layout.num_tokens)
    tiles = [
        number
        for group, (start, end) in enumerate(layout.spans)
        if widths[group]
        for first in range(start, end, tile_tokens)
        for number in (group, first)
    ]
    chunk_tokens = _chunk_tokens(layout.num_tokens)
    chunks = [
        (group, first, min(first + chunk_tokens, end))
        for group, (start, end) in enumerate(layout.spans)
        for first in range(start, end, chunk_tokens)
    ]
    # The stacked A of a range reads the whole width, scaled by one; B of projection j its own columns.
    columns = [list(accumulate(ranks, initial=0)) for ranks in layout.ranks]
    a_sizes = [rank * layout.in_features for ranks in layout.ranks for rank in ranks]
    b_sizes = [
        rank * features for ranks in layout.ranks for rank, features in zip(ranks, layout.out_features, strict=True)
    ]
    offsets = list(accumulate(a_sizes + b_sizes, initial=0))
    num_ranges, num_projections = len(lengths), len(layout.out_features)
    narrow_offsets = list(accumulate(narrow_sizes, initial=0))
    chunk_counts = [sum(chunk[0] == group for chunk in chunks) for group in range(num_ranges)]
    first_chunks = list(accumulate(chunk_counts, initial=0))

    def rows(projection: int | None) -> list[tuple[int, ...]]:
        found: list[tuple[int, ...]] = []
        for group, (start, end) in enumerate(layout.spans):
            if projection is None:
                at = group * num_projections
                factor = (widths[group], 0, offsets[at], 1.0)
            else:
                at = (num_ranges + group) * num_projections + projection
                rank, column = layout.ranks[group][projection], columns[group][projection]
                factor = (rank, column, offsets[at], layout.scalings[group][projection])
            rank, column, offset, scaling = factor
            (bits,) = struct.unpack("i", struct.pack("f", scaling))
            place = (narrow_offsets[group], offset, bits, first_chunks[group], chunk_counts[group])
            found.append((start, end, rank, column, widths[group], *place))
        return found

    factors = [rows(projection) for projection in (None, *range(num_projections))]
    numbers = tiles + [number for chunk in chunks for number in chunk]
    numbers += [number for table in factors for row in table for number in row]
    sent = torch.tensor(numbers, dtype=torch.int32)
    if layout.device.type == "cuda":
        sent = sent.pin_memory().to(layout.device, non_blocking=True)
    parts = sent.split([len(tiles), 3 * len(chunks), *[num_ranges * FIELDS] * len(factors)])
    rank_align = 8 if all(rank % 8 == 0 for ranks in layout.ranks for rank in ranks) else 1
    factor_tables = [
        FactorTable(
            ints.view(num_ranges, FIELDS),
            ints.view(torch.float32).view(num_ranges, FIELDS),
            features,
            position == 0,
            max((row[2] for row in table), default=0),
            rank_align,
            8 if all(row[6] % 8 == 0 for row in table) else 1,
        )
        for position, (ints, features, table) in enumerate(
            zip(parts[2:], (layout.in_features, *layout.out_features), factors, strict=True)
        )
    ]
    return Tables(
        parts[0].view(-1, 2),
        parts[1].view(-1, 3),
        factor_tables[0],
        tuple(factor_tables[1:]),
        tile_tokens,
        tuple(widths),
        tuple(narrow_sizes),
        tuple(size for size in a_sizes + b_sizes if size),
    )


def _tile_tokens(num_tokens: int) -> int:
    """Tall tiles reuse a factor more often; short ones keep all of some 130 multiprocessors busy."""
    return next((tokens for tokens in (64, 32) if num_tokens >= tokens * 128), 16)


def _chunk_tokens(num_tokens: int) -> int:
    """About 16 chunks, so that even a narrow projection has enough programs; a power of two in 128..1024."""
    return min(1024, max(128, 1 << (num_tokens // 16).bit_length()))
