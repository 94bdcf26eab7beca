"""The backward of causal grouped-query attention as plain matrix products, in blocks of queries.

torch's CPU flash attention is fast forward, but in 16-bit types its backward runs far below GEMM speed: at 64 tokens a
sample the products below take a fraction of its time, at 2048 still less than it does. In float32 they gain nothing.

Letters: B samples, H query heads, G key-value heads, n = H / G, L tokens of a sample, d features, q queries of a block.
"""

import torch
from torch import Tensor

BLOCK = 64


def causal_attention_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, log_z: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``softmax(scale q k^T) v`` below the diagonal.

    The query heads that share a key-value head stand as further rows of one product, so their gradients of k and v add
    up inside it. Probabilities are computed again, from scores in float32: where attention is sharp, scores are large,
    and rounding them to 16 bits would give the backward other probabilities than the forward had.

    Args:
        d_out: gradient of out, ``[B, H, L, d]``.
        q: ``[B, H, L, d]``.
        k: ``[B, G, L, d]``.
        v: ``[B, G, L, d]``.
        log_z: log-sum-exp of the scaled scores, ``[B, H, L]``, float32.
        scale: of the scores.

    Returns:
        dq ``[B, H, L, d]``, dk and dv ``[B, G, L, d]``.
    """
    num_samples, num_heads, length, size = q.shape
    groups = k.shape[1]
    share = num_heads // groups

    def rows(x: Tensor, start: int, end: int) -> Tensor:
        """A block of queries of all heads, ``[B * G, n * q, ...]``."""
        return x.unflatten(1, (groups, share))[:, :, :, start:end].flatten(2, 3).flatten(0, 1)

    keys, values = k.flatten(0, 1), v.flatten(0, 1)  # [B * G, L, d]
    dq = torch.empty(num_samples, groups, share, length, size, dtype=q.dtype, device=q.device)
    dk, dv = (torch.zeros(keys.shape, dtype=torch.float32, device=q.device) for _ in range(2))
    for start in range(0, length, BLOCK):
        end = min(start + BLOCK, length)
        q_rows, d_rows = rows(q, start, end), rows(d_out, start, end)
        seen_keys, seen_values = keys[:, :end], values[:, :end]
        p = q_rows.float() @ seen_keys.float().transpose(1, 2)  # [B * G, n * q, end]
        p.mul_(scale).sub_(rows(log_z, start, end)[:, :, None]).exp_()
        future = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device).triu_(1)
        p.unflatten(1, (share, end - start))[..., start:].masked_fill_(future, 0.0)
        dp = (d_rows @ seen_values.transpose(1, 2)).float()
        d_scores = dp.sub_((dp * p).sum(dim=2, keepdim=True)).mul_(p).mul_(scale).to(q.dtype)
        dv[:, :end] += p.to(q.dtype).transpose(1, 2) @ d_rows
        dk[:, :end] += d_scores.transpose(1, 2) @ q_rows
        dq[:, :, :, start:end] = (d_scores @ seen_keys).view(num_samples, groups, share, end - start, size)
    return dq.flatten(1, 2), dk.to(k.dtype).view_as(k), dv.to(v.dtype).view_as(v)
