"""Weight gradients of the fused mixture: dB1, dB3 and dA2 of all experts, a program a block of features.

Letters: N tokens, F ffn, E experts, K top-k, R rank, ER all experts' ranks, WIDTH columns that a program may need.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from .kernel_backward import slot_gradients
from .kernel_tiles import chosen_values, columns, feature_block, low_rank


@triton.jit(do_not_specialize=["num_tokens", "num_splits"])
def weight_gradients_kernel(
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
    db1,
    db3,
    da2,
    stride_p1,
    stride_p3,
    stride_dh,
    stride_mask,
    num_tokens,
    num_splits,
    scaling,
    F: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    WIDTH: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One block of features, one range of tokens, one block of columns: all experts', or where sorted one expert's.

    Sorted programs walk over the (token, slot) pairs of their expert, the others over all tokens and their slots.
    ``db1``, ``db3`` and ``da2`` take partial sums ``[splits, ER, F]`` in float32.
    """
    SORTED: tl.constexpr = order is not None
    SLOTS: tl.constexpr = 1 if SORTED else K
    CHUNKS: tl.constexpr = (WIDTH + BLOCK_C - 1) // BLOCK_C
    features = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    split = tl.program_id(1)
    out_start = 0 if CHUNKS == 1 else tl.program_id(2) % CHUNKS * BLOCK_C
    if SORTED:
        expert = tl.program_id(2) // CHUNKS
        begin, end = tl.load(starts + expert), tl.load(starts + expert + 1)
    else:
        expert = 0
        begin, end = 0, num_tokens
    out_expert, out_rank = columns(out_start, expert, R, WIDTH, False, BLOCK_C)

    sums1 = tl.zeros([BLOCK_C, BLOCK_F], tl.float32)
    sums3 = tl.zeros([BLOCK_C, BLOCK_F], tl.float32)
    sums2 = tl.zeros([BLOCK_C, BLOCK_F], tl.float32)
    steps = tl.cdiv(tl.cdiv(end - begin, BLOCK_N), num_splits)
    begin += split * steps * BLOCK_N
    for step in range(steps):
        index = begin + step * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
        inside = index < end
        if SORTED:
            sorted_pairs = tl.load(order + index, mask=inside, other=0)
            tokens = sorted_pairs // K
        else:
            tokens = index
        base1 = feature_block(p1, tokens * stride_p1, inside, features, F)
        base3 = feature_block(p3, tokens * stride_p3, inside, features, F)
        upstream = feature_block(dhidden, tokens * stride_dh, inside, features, F)
        for slot in tl.range(0, SLOTS, loop_unroll_factor=UNROLL):
            if SORTED:
                pairs = sorted_pairs
            else:
                pairs = tokens * K + slot
            gate = tl.load(gates + pairs, mask=inside, other=0.0).to(tl.float32)
            chosen = tl.load(experts + pairs, mask=inside, other=-1).to(tl.int32)
            u1, u3, dh = base1, base3, upstream
            if a1 is not None:
                u1 += scaling * low_rank(
                    a1, b1, pairs * R, chosen, expert, features, F, R, WIDTH, False, False, BLOCK_N, BLOCK_F, BLOCK_C
                )
            if a3 is not None:
                u3 += scaling * low_rank(
                    a3, b3, pairs * R, chosen, expert, features, F, R, WIDTH, False, False, BLOCK_N, BLOCK_F, BLOCK_C
                )
            if h_mask is not None:
                dropout = feature_block(h_mask, tokens * stride_mask, inside, features, F)
            if a2 is not None:
                wide = tokens * (E * R)
                lifted = low_rank(
                    dlowered, a2, wide, chosen, expert, features, F, R, WIDTH, True, False, BLOCK_N, BLOCK_F, BLOCK_C
                )
                dh += lifted * dropout if h_mask is not None else lifted
            h, du1, du3 = slot_gradients(u1, u3, dh * gate[:, None])
            if a1 is not None:
                left = chosen_values(a1, pairs * R, chosen, out_expert, out_rank, R, False)
                sums1 = tl.dot(tl.trans(left), du1.to(left.dtype), sums1, input_precision="ieee")
            if a3 is not None:
                left = chosen_values(a3, pairs * R, chosen, out_expert, out_rank, R, False)
                sums3 = tl.dot(tl.trans(left), du3.to(left.dtype), sums3, input_precision="ieee")
            if a2 is not None:
                h *= gate[:, None]
                if h_mask is not None:
                    h *= dropout
                left = chosen_values(dlowered, tokens * (E * R), chosen, out_expert, out_rank, R, True)
                sums2 = tl.dot(tl.trans(left), h.to(left.dtype), sums2, input_precision="ieee")

    row = (split * E + out_expert).to(tl.int64) * R + out_rank
    place = row[:, None] * F + features[None, :]
    mask = (out_expert >= 0)[:, None] & (features < F)[None, :]
    if a1 is not None:
        tl.store(db1 + place, sums1 * scaling, mask=mask)
    if a3 is not None:
        tl.store(db3 + place, sums3 * scaling, mask=mask)
    if a2 is not None:
        tl.store(da2 + place, sums2, mask=mask)
