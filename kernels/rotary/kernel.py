"""Rotary position embedding in Triton.

Letters: T tokens, H heads, d features per head.
"""

# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..registration import on_its_device


@triton.jit
def _turn(
    x_ptr,
    cos_ptr,
    sin_ptr,
    y_ptr,
    x_token_stride,
    x_head_stride,
    x_feature_stride,
    H,
    HALF,
    SIGN: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BLOCK_H)[:, None]  # [BLOCK_H, 1]
    feature = tl.arange(0, BLOCK_HALF)[None, :]  # [1, BLOCK_HALF]
    inside = (head < H) & (feature < HALF)
    cos = tl.load(cos_ptr + token * 2 * HALF + feature, mask=feature < HALF, other=0.0)
    sin = SIGN * tl.load(sin_ptr + token * 2 * HALF + feature, mask=feature < HALF, other=0.0)
    x = x_ptr + token * x_token_stride + head * x_head_stride + feature * x_feature_stride
    first = tl.load(x, mask=inside, other=0.0).to(cos.dtype)
    second = tl.load(x + HALF * x_feature_stride, mask=inside, other=0.0).to(cos.dtype)
    y = y_ptr + token * H * 2 * HALF + head * 2 * HALF + feature
    tl.store(y, (first * cos - second * sin).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(y + HALF, (second * cos + first * sin).to(y_ptr.dtype.element_ty), mask=inside)


@on_its_device
def rotary_forward(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> Tensor:
    """As the reference's; x is read where it lies, whatever its strides."""
    tokens, heads, size = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        block_h, block_half = triton.next_power_of_2(heads), triton.next_power_of_2(size // 2)
        _turn[(tokens,)](
            x,
            cos.contiguous(),
            sin.contiguous(),
            y,
            *x.stride(),
            heads,
            size // 2,
            SIGN=-1.0 if back else 1.0,
            BLOCK_H=block_h,
            BLOCK_HALF=block_half,
            num_warps=min(8, max(1, block_h * block_half // 256)),
        )
    return y
