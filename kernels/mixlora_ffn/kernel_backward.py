"""Backward of the fused mixture: gradients of W1x, W3x, A1x, A3x and of the gates, a program a tile of tokens.

Every ``[N, F]`` intermediate is computed again in registers.

Letters: N tokens, F ffn, E experts, K top-k, R rank, ER all experts' ranks, WIDTH columns that a program may need.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from .kernel_tiles import columns, factor_block, feature_block, low_rank, tile_tokens


@triton.jit
def slot_gradients(u1, u3, dh):
    """h, and the gradients of u1 and u3, given that of h."""
    sigmoid = tl.sigmoid(u1)
    silu = u1 * sigmoid
    return silu * u3, dh * u3 * (sigmoid + silu * (1.0 - sigmoid)), dh * silu


@triton.jit(do_not_specialize=["num_tokens", "blocks_per_split"])
def token_gradients_kernel(
    p1,
    p3,
    dhidden,
    h_mask,
    dlowered,
    gates,
    experts,
    a1,
    a3,
    b1,
    b3,
    a2,
    order,
    starts,
    dp1,
    dp3,
    da1,
    da3,
    dgates,
    stride_p1,
    stride_p3,
    stride_dh,
    stride_mask,
    num_tokens,
    blocks_per_split,
    scaling,
    F: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    WIDTH: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One tile of tokens, one range of features, one block of the columns of da1 and da3.

    ``da1`` and ``da3`` take partial sums ``[splits, N, K, R]`` and ``dgates`` ``[splits, N, K]``, in float32.
    """
    LISTED: tl.constexpr = order is not None
    split = tl.program_id(1)
    out_start = 0 if WIDTH <= BLOCK_C else tl.program_id(2) * BLOCK_C
    tokens, inside, first, is_any = tile_tokens(order, starts, num_tokens, BLOCK_N)
    table = experts + first * K if LISTED else 0
    out_expert, out_rank = columns(out_start, table, R, WIDTH, LISTED, BLOCK_C)

    slots = tl.arange(0, BLOCK_K)
    gate_sums = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    sums1 = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    sums3 = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    num_blocks = tl.minimum(blocks_per_split, tl.cdiv(F, BLOCK_F) - split * blocks_per_split)
    for block in range(tl.where(is_any, num_blocks, 0)):
        features = (split * blocks_per_split + block) * BLOCK_F + tl.arange(0, BLOCK_F)
        base1 = feature_block(p1, tokens * stride_p1, inside, features, F)
        base3 = feature_block(p3, tokens * stride_p3, inside, features, F)
        upstream = feature_block(dhidden, tokens * stride_dh, inside, features, F)
        d1 = tl.zeros([BLOCK_N, BLOCK_F], tl.float32)
        d3 = tl.zeros([BLOCK_N, BLOCK_F], tl.float32)
        for slot in tl.range(0, K, loop_unroll_factor=UNROLL):
            pairs = tokens * K + slot
            gate = tl.load(gates + pairs, mask=inside, other=0.0).to(tl.float32)
            chosen = tl.load(experts + pairs, mask=inside, other=-1).to(tl.int32)
            u1, u3, dh = base1, base3, upstream
            if a1 is not None:
                u1 += scaling * low_rank(
                    a1, b1, pairs * R, chosen, table, features, F, R, WIDTH, False, LISTED, BLOCK_N, BLOCK_F, BLOCK_C
                )
            if a3 is not None:
                u3 += scaling * low_rank(
                    a3, b3, pairs * R, chosen, table, features, F, R, WIDTH, False, LISTED, BLOCK_N, BLOCK_F, BLOCK_C
                )
            if a2 is not None:
                offsets = tokens * (E * R)
                lifted = low_rank(
                    dlowered, a2, offsets, chosen, table, features, F, R, WIDTH, True, LISTED, BLOCK_N, BLOCK_F, BLOCK_C
                )
                if h_mask is not None:
                    lifted *= feature_block(h_mask, tokens * stride_mask, inside, features, F)
                dh += lifted
            h, du1, du3 = slot_gradients(u1, u3, dh * gate[:, None])
            gate_sums += tl.where(slots[None, :] == slot, tl.sum(dh * h, axis=1)[:, None], 0.0)
            d1 += du1
            d3 += du3
            is_chosen = out_expert[None, :] == chosen[:, None]
            if a1 is not None:
                up1 = factor_block(b1, out_expert, out_rank, features, R, F)  # [BLOCK_C, BLOCK_F]
                found1 = tl.dot(du1.to(up1.dtype), tl.trans(up1), input_precision="ieee")
                sums1 += tl.where(is_chosen, found1, 0.0)
            if a3 is not None:
                up3 = factor_block(b3, out_expert, out_rank, features, R, F)
                found3 = tl.dot(du3.to(up3.dtype), tl.trans(up3), input_precision="ieee")
                sums3 += tl.where(is_chosen, found3, 0.0)
        if out_start == 0:
            mask = inside[:, None] & (features < F)[None, :]
            row = (tokens * F)[:, None] + features[None, :]
            tl.store(dp1 + row, d1.to(dp1.dtype.element_ty), mask=mask)
            tl.store(dp3 + row, d3.to(dp3.dtype.element_ty), mask=mask)

    place = split * num_tokens * K + tokens * K
    if out_start == 0:
        mask = inside[:, None] & (slots < K)[None, :]
        tl.store(dgates + place[:, None] + slots[None, :], gate_sums, mask=mask)
    for slot in range(K):
        chosen = tl.load(experts + tokens * K + slot, mask=inside, other=-1).to(tl.int32)
        offsets = ((place + slot) * R)[:, None] + out_rank[None, :]
        mask = out_expert[None, :] == chosen[:, None]
        if a1 is not None:
            tl.store(da1 + offsets, sums1 * scaling, mask=mask)
        if a3 is not None:
            tl.store(da3 + offsets, sums3 * scaling, mask=mask)
