"""Autograd for causal attention over samples of equal length."""

from typing import Any

import torch
from torch import Tensor

from .reference import causal_attention_backward


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        share = q.shape[1] // k.shape[1]
        out, log_z = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k.repeat_interleave(share, 1), v.repeat_interleave(share, 1), 0.0, True
        )
        ctx.save_for_backward(q, k, v, log_z)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        q, k, v, log_z = ctx.saved_tensors
        return causal_attention_backward(grads[0], q, k, v, log_z, q.shape[3] ** -0.5)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every token attends to itself and the earlier tokens of its own sample.

    Args:
        q: ``[B, H, L, d]``.
        k: ``[B, G, L, d]``, H a multiple of G.
        v: ``[B, G, L, d]``.

    Returns:
        ``[B, H, L, d]``.
    """
    if q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16):
        result: Tensor = _CausalAttention.apply(q, k, v)
        return result
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
