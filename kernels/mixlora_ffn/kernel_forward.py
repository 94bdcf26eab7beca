"""Forward of the fused mixture: a program reads W1x and W3x of its tile once and writes h and C once.

Letters: N tokens, F ffn, E experts, K top-k, R rank, WIDTH columns that a program may need.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from .kernel_tiles import columns, factor_block, feature_block, low_rank, tile_tokens


@triton.jit(do_not_specialize=["num_tokens", "blocks_per_split"])
def forward_kernel(
    p1,
    p3,
    h_mask,
    gates,
    experts,
    a1,
    a3,
    b1,
    b3,
    a2,
    order,
    starts,
    hidden,
    lowered,
    stride_p1,
    stride_p3,
    stride_mask,
    num_tokens,
    blocks_per_split,
    scaling,
    F: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    WIDTH: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One tile of tokens, one range of features, one block of C's columns.

    ``lowered`` takes partial sums ``[splits, N, K, R]`` in float32. Only wide mixtures have a second block of columns.
    """
    LISTED: tl.constexpr = order is not None
    split = tl.program_id(1)
    out_start = 0 if WIDTH <= BLOCK_C else tl.program_id(2) * BLOCK_C
    tokens, inside, first, is_any = tile_tokens(order, starts, num_tokens, BLOCK_N)
    table = experts + first * K if LISTED else 0
    out_expert, out_rank = columns(out_start, table, R, WIDTH, LISTED, BLOCK_C)

    sums = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    num_blocks = tl.minimum(blocks_per_split, tl.cdiv(F, BLOCK_F) - split * blocks_per_split)
    for block in range(tl.where(is_any, num_blocks, 0)):
        features = (split * blocks_per_split + block) * BLOCK_F + tl.arange(0, BLOCK_F)
        base1 = feature_block(p1, tokens * stride_p1, inside, features, F)
        base3 = feature_block(p3, tokens * stride_p3, inside, features, F)
        h = tl.zeros([BLOCK_N, BLOCK_F], tl.float32)
        for slot in tl.range(0, K, loop_unroll_factor=UNROLL):
            pairs = tokens * K + slot
            gate = tl.load(gates + pairs, mask=inside, other=0.0).to(tl.float32)
            chosen = tl.load(experts + pairs, mask=inside, other=-1).to(tl.int32)
            u1, u3 = base1, base3
            if a1 is not None:
                u1 += scaling * low_rank(
                    a1, b1, pairs * R, chosen, table, features, F, R, WIDTH, False, LISTED, BLOCK_N, BLOCK_F, BLOCK_C
                )
            if a3 is not None:
                u3 += scaling * low_rank(
                    a3, b3, pairs * R, chosen, table, features, F, R, WIDTH, False, LISTED, BLOCK_N, BLOCK_F, BLOCK_C
                )
            slot_h = gate[:, None] * u1 * tl.sigmoid(u1) * u3
            h += slot_h
            if a2 is not None:
                if h_mask is not None:
                    slot_h *= feature_block(h_mask, tokens * stride_mask, inside, features, F)
                down = factor_block(a2, out_expert, out_rank, features, R, F)  # [BLOCK_C, BLOCK_F]
                found = tl.dot(slot_h.to(down.dtype), tl.trans(down), input_precision="ieee")
                sums += tl.where(out_expert[None, :] == chosen[:, None], found, 0.0)
        if out_start == 0:
            mask = inside[:, None] & (features < F)[None, :]
            tl.store(hidden + (tokens * F)[:, None] + features[None, :], h.to(hidden.dtype.element_ty), mask=mask)

    if a2 is not None:
        for slot in range(K):
            pairs = tokens * K + slot
            chosen = tl.load(experts + pairs, mask=inside, other=-1).to(tl.int32)
            place = (split * num_tokens * K + pairs) * R
            mask = out_expert[None, :] == chosen[:, None]
            tl.store(lowered + place[:, None] + out_rank[None, :], sums, mask=mask)
