"""Causal attention over samples laid end to end, with and without a cache.

Letters: T tokens, B samples, H query heads, G key-value heads, L tokens of a sample, P tokens in its cache, d features.
"""

import itertools

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from moe_peft import ops
from moe_peft.model.cache import KVCache


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    boundaries: tuple[int, ...],
    window: int | None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Every token attends to itself and the earlier tokens of its own sample.

    Args:
        q: ``[T, H, d]``.
        k: ``[T, G, d]``.
        v: ``[T, G, d]``.
        boundaries: first token of every sample, then T.
        window: tokens a token may attend to, itself included; None: all.
        cu_seqlens: the boundaries as int32 on q's device; a GPU would copy them once a layer without.

    Returns:
        ``[T, H, d]``.
    """
    return ops.causal_attention(q, k, v, boundaries, window, cu_seqlens)


def suffix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    asking: tuple[int, ...],
    boundaries: tuple[int, ...],
    window: int | None,
) -> Tensor:
    """As ``varlen_attention``, for the last tokens of every sample alone.

    Args:
        q: ``[T', H, d]``.
        k: ``[T, G, d]``.
        v: ``[T, G, d]``.
        asking: first query of every sample, then T'.
        boundaries: first token of every sample, then T.
        window: as in ``varlen_attention``.

    Returns:
        ``[T', H, d]``.
    """
    outputs = []
    for (first, last), (start, end) in zip(itertools.pairwise(asking), itertools.pairwise(boundaries), strict=True):
        num_queries = last - first
        mask = _causal_mask(num_queries, end - start - num_queries, window, q.device)
        queries, keys, values = (x.transpose(0, 1)[None] for x in (q[first:last], k[start:end], v[start:end]))
        mixed = scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)
        outputs.append(mixed[0].transpose(0, 1))  # [L', H, d]
    return torch.cat(outputs)


def cached_attention(
    q: Tensor, k: Tensor, v: Tensor, boundaries: tuple[int, ...], window: int | None, cache: KVCache, layer_idx: int
) -> Tensor:
    """As ``varlen_attention``, behind the tokens in the cache, which takes up the new ones."""
    cache.write(layer_idx, k, v, boundaries)
    keys, values = cache.keys_[layer_idx], cache.values_[layer_idx]
    num_samples = len(cache.lengths_)
    if q.shape[0] == num_samples:
        return _decode_attention(q, keys, values, cache.lengths_, window)
    outputs = []
    for sample, past in enumerate(cache.lengths_):
        start, end = boundaries[sample], boundaries[sample + 1]
        total = past + end - start
        mask = _causal_mask(end - start, past, window, q.device)  # [L, P + L]
        mixed = scaled_dot_product_attention(
            q[start:end].transpose(0, 1)[None],
            keys[sample : sample + 1, :, :total],
            values[sample : sample + 1, :, :total],
            attn_mask=mask,
            enable_gqa=True,
        )
        outputs.append(mixed[0].transpose(0, 1))  # [L, H, d]
    return torch.cat(outputs)


def _decode_attention(q: Tensor, keys: Tensor, values: Tensor, past: list[int], window: int | None) -> Tensor:
    """One new token a sample: a single masked call over all rows of the cache."""
    longest = max(past) + 1
    slots = torch.arange(longest, device=q.device)
    position = torch.tensor(past, device=q.device)[:, None]  # [B, 1]
    visible = slots <= position
    if window is not None:
        visible &= slots > position - window
    mixed = scaled_dot_product_attention(
        q[:, :, None],
        keys[:, :, :longest],
        values[:, :, :longest],
        attn_mask=visible[:, None, None],
        enable_gqa=True,
    )
    return mixed[:, :, 0]


def _causal_mask(length: int, past: int, window: int | None, device: torch.device) -> Tensor:
    """``[L, P + L]``, True where a new token may look."""
    position = torch.arange(past, past + length, device=device)[:, None]
    slots = torch.arange(past + length, device=device)
    visible = slots <= position
    return visible if window is None else visible & (slots > position - window)
