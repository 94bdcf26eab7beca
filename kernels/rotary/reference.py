"""Rotary position embedding in plain PyTorch.

Letters: T tokens, H heads, d features per head.
"""

import torch
from torch import Tensor


def rotary_forward(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> Tensor:
    """Turn the feature pairs ``(i, i + d/2)`` of every head, or turn them back, which is the backward.

    Args:
        x: ``[T, H, d]``.
        cos: ``[T, 1, d]``, at least float32, both halves equal.
        sin: as cos.
        back: turn by the opposite angle.

    Returns:
        ``[T, H, d]`` in x's dtype.
    """
    half = x.shape[-1] // 2
    signed = sin.clone()
    (signed[..., half:] if back else signed[..., :half]).neg_()
    wide = x.to(torch.promote_types(x.dtype, cos.dtype))
    # Whole heads at a time: writing the two halves of y one by one takes longer than this copy.
    swapped = torch.cat([wide[..., half:], wide[..., :half]], dim=-1)  # [T, H, d]
    return swapped.mul_(signed).addcmul_(wide, cos).to(x.dtype)
