"""How the fused mixture is cut into programs, chosen from shapes alone so that nothing waits for the device.

A program takes a tile of tokens and walks over features. What it contracts for a token and slot is the token's ``A x``
with the transposed B of *all columns the tile may need*, masked to the columns of the slot's expert:

- **dense-masked**: tiles are consecutive tokens, the columns are all experts' ranks, E*R of them.
- **sorted**: tokens are ordered by their set of experts and no tile holds two sets, so K*R columns do; but every set's
  last tile is partly empty.

Letters: N tokens of one adapter, F ffn, E experts, K top-k, R rank.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Programs that fill an H100's 132 multiprocessors a few times over; a fixed number, so that bits depend on shapes only.
_TOKEN_PROGRAMS = 528
_WEIGHT_PROGRAMS = 264
# What a token costs beside its columns, in columns, and what sorting costs, in tokens: estimates, counted from
# instructions, bytes and launches on an H100.
_FIXED_COLUMNS = 64
_SORTING_TOKENS = 2048
_MOST_UNROLLED = 4
# A set of experts is a bit mask in an int64.
_MOST_EXPERTS = 64


@dataclass(frozen=True)
class Blocks:
    """Sizes of a kernel's blocks: tokens, features and columns of a program's step, and its warps."""

    tokens: int
    features: int
    columns: int
    warps: int
    unroll: bool  # the loop over slots

    def as_arguments(self, top_k: int) -> dict[str, int]:
        """As a kernel's launch takes them."""
        return {
            "UNROLL": top_k if self.unroll and top_k <= _MOST_UNROLLED else 1,
            "BLOCK_N": self.tokens,
            "BLOCK_F": self.features,
            "BLOCK_C": self.columns,
            "num_warps": self.warps,
            "num_stages": 2,
        }


def token_blocks(width: int, dtype: torch.dtype) -> Blocks:
    """Blocks of the kernels whose programs take a tile of tokens.

    A product that feeds another one is laid out with 16 tokens a warp, so fewer tokens would be computed twice. Where
    columns are few, the loop over slots is unrolled, and loads of later features start early; where they are many,
    that spills registers.
    """
    if dtype == torch.float32:
        return Blocks(32, 32, _columns(width, 64), 4, unroll=False)
    columns = _columns(width, 128)
    return Blocks(64, 32, columns, 4 if columns <= 32 else 8, unroll=columns <= 32)


def weight_blocks(width: int, dtype: torch.dtype) -> Blocks:
    """Blocks of the kernel that sums weight gradients over tokens."""
    if dtype == torch.float32:
        return Blocks(32, 32, _columns(width, 64), 4, unroll=False)
    columns = _columns(width, 128)
    return Blocks(32, 64, columns, 4 if columns <= 32 else 8, unroll=True)


def _columns(width: int, most: int) -> int:
    """A power of two that holds the columns, or the widest block; tl.dot contracts at least 16."""
    return max(16, min(most, 1 << (width - 1).bit_length()))


def num_expert_sets(num_tokens: int, num_experts: int, top_k: int) -> int:
    """Most sets of K experts that the tokens can have chosen."""
    return min(num_tokens, math.comb(num_experts, top_k))


def prefers_sorted(num_tokens: int, num_experts: int, top_k: int, rank: int) -> bool:
    """Whether sorting the tokens pays for its partly empty tiles and its launches."""
    if num_experts > _MOST_EXPERTS or top_k == num_experts:
        return False
    sets = num_expert_sets(num_tokens, num_experts, top_k)
    half_empty = sets * token_blocks(top_k * rank, torch.bfloat16).tokens // 2
    dense, compact = (_FIXED_COLUMNS + max(16, count * rank) for count in (num_experts, top_k))
    return (num_tokens + half_empty + _SORTING_TOKENS) * compact < num_tokens * dense


def feature_splits(num_tiles: int, num_blocks: int) -> int:
    """Into how many ranges the blocks of features are cut, so that few tiles still fill the device."""
    return max(1, min(num_blocks, _TOKEN_PROGRAMS // max(1, num_tiles)))


def token_splits(num_programs: int, num_blocks: int) -> int:
    """Into how many ranges the tokens are cut where weight gradients are summed, none too small for its partial sum."""
    return max(1, min(num_blocks // 8, _WEIGHT_PROGRAMS // max(1, num_programs)))


def most_tiles(num_tokens: int, num_experts: int, top_k: int, block: int) -> int:
    """Upper bound on the tiles that ``tiles_by_set`` finds, the sum of ``ceil(tokens of a set / block)``."""
    sets = num_expert_sets(num_tokens, num_experts, top_k)
    return (num_tokens - sets) // block + sets


def tiles_by_set(experts: Tensor, num_experts: int, block: int) -> tuple[Tensor, Tensor]:
    """Tokens ordered by their set of experts, and where the tiles begin.

    Args:
        experts: ``[N, K]``, distinct in a row.
        num_experts: E, at most 64.
        block: tokens of a full tile.

    Returns:
        order ``[N]``, the tokens; and starts ``[most_tiles + 1]``: tile i is ``order[starts[i]:starts[i + 1]]``, empty
        for the tiles that the bound has too many. Both are int64 on the device; nothing is copied to the host.
    """
    num_tokens, top_k = experts.shape
    sets = torch.ones_like(experts).bitwise_left_shift_(experts).sum(dim=1)  # a bit an expert
    sets, order = torch.sort(sets, stable=True)
    index = torch.arange(num_tokens, device=experts.device)
    in_set = index - torch.searchsorted(sets, sets)
    tile = (in_set % block == 0).cumsum(0)  # counted from 1
    count = most_tiles(num_tokens, num_experts, top_k, block)
    return order, torch.searchsorted(tile, torch.arange(1, count + 2, device=experts.device))


def pairs_by_expert(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """(token, slot) pairs ordered by expert, then by token.

    Returns:
        order ``[N*K]``, a pair being ``token * K + slot``; and starts ``[E + 1]``: those of expert e are
        ``order[starts[e]:starts[e + 1]]``. Both are int64 on the device.
    """
    chosen, order = torch.sort(experts.flatten(), stable=True)
    return order, torch.searchsorted(chosen, torch.arange(num_experts + 1, device=experts.device))
