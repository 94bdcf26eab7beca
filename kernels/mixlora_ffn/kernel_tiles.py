"""What the mixture's Triton kernels share: the columns of a block, and the low-rank product of a slot's expert.

A column is one rank of one expert. Values of tokens are compact, ``[N, K, R]`` in the order of a token's slots, or
wide, ``[N, ER]``; a factor is a stack of transposed B, or of A2, ``[ER, F]``.

Letters: N tokens, F ffn, E experts, K top-k, R rank, ER all experts' ranks, WIDTH columns that a program may need.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def tile_tokens(order, starts, num_tokens, BLOCK_N: tl.constexpr):
    """Tokens of this program's tile ``[BLOCK_N]``, which of them are there, one that is, and whether there is any."""
    tile = tl.program_id(0)
    index = tl.arange(0, BLOCK_N)
    if order is None:
        tokens = tile.to(tl.int64) * BLOCK_N + index
        inside = tokens < num_tokens
        first, is_any = tile.to(tl.int64) * BLOCK_N, tile >= 0
    else:
        begin, end = tl.load(starts + tile), tl.load(starts + tile + 1)
        is_any = begin < end
        inside = begin + index < end
        tokens = tl.load(order + begin + index, mask=inside, other=0)
        first = tl.load(order + begin, mask=is_any, other=0)
    return tokens, inside, first, is_any


@triton.jit
def columns(start, experts, R: tl.constexpr, WIDTH: tl.constexpr, LISTED: tl.constexpr, BLOCK_C: tl.constexpr):
    """Expert and rank of each column of a block; past WIDTH the expert is -2, which nobody chose.

    ``experts`` is the first expert, whose neighbours follow, or where LISTED a pointer to the list of them.
    """
    column = start + tl.arange(0, BLOCK_C)
    inside = column < WIDTH
    if LISTED:
        expert = tl.load(experts + column // R, mask=inside, other=-2).to(tl.int32)
    else:
        expert = tl.where(inside, experts + column // R, -2)
    return expert, column % R


@triton.jit
def chosen_values(values, offsets, row_expert, expert, rank, R: tl.constexpr, WIDE: tl.constexpr):
    """``[BLOCK_N, BLOCK_C]`` values of the tokens, zero outside the columns of each token's chosen expert."""
    place = rank + expert * R if WIDE else rank
    chosen = expert[None, :] == row_expert[:, None]
    return tl.load(values + offsets[:, None] + place[None, :], mask=chosen, other=0.0)


@triton.jit
def factor_block(factor, expert, rank, features, R: tl.constexpr, F: tl.constexpr):
    """``[BLOCK_C, BLOCK_F]`` of a factor."""
    place = (expert * R + rank).to(tl.int64) * F
    inside = (expert >= 0)[:, None] & (features < F)[None, :]
    return tl.load(factor + place[:, None] + features[None, :], mask=inside, other=0.0)


@triton.jit
def low_rank(
    values,
    factor,
    offsets,
    row_expert,
    experts,
    features,
    F: tl.constexpr,
    R: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    LISTED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``[BLOCK_N, BLOCK_F]`` product of each token's values with the factor of its chosen expert."""
    total = tl.zeros([BLOCK_N, BLOCK_F], tl.float32)
    for start in range(0, WIDTH, BLOCK_C):
        expert, rank = columns(start, experts, R, WIDTH, LISTED, BLOCK_C)
        left = chosen_values(values, offsets, row_expert, expert, rank, R, WIDE)
        right = factor_block(factor, expert, rank, features, R, F)
        total = tl.dot(left, right, total, input_precision="ieee")
    return total


@triton.jit
def feature_block(tensor, offsets, inside, features, F: tl.constexpr):
    """``[BLOCK_N, BLOCK_F]`` of a tensor with F features a row, in float32."""
    mask = inside[:, None] & (features < F)[None, :]
    return tl.load(tensor + offsets[:, None] + features[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["num_tokens", "num_splits"])
def spread_kernel(
    partial,
    experts,
    spread,
    num_tokens,
    num_splits,
    E: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum ``[stacks, splits, N, K, R]`` over splits in order, into ``[N, stacks * ER]``, zero outside the chosen."""
    stack = tl.program_id(2)
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = tokens < num_tokens
    expert, rank = columns(tl.program_id(1) * BLOCK_C, 0, R, E * R, False, BLOCK_C)
    total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for slot in range(K):
        row_expert = tl.load(experts + tokens * K + slot, mask=inside, other=-1).to(tl.int32)
        for split in range(num_splits):
            offsets = (((stack * num_splits + split) * num_tokens + tokens) * K + slot) * R
            total += chosen_values(partial, offsets, row_expert, expert, rank, R, False)
    row = tokens * (tl.num_programs(2) * E * R) + stack * (E * R)
    mask = inside[:, None] & (expert >= 0)[None, :]
    tl.store(spread + row[:, None] + (expert * R + rank)[None, :], total.to(spread.dtype.element_ty), mask=mask)
