"""Causal attention over samples laid end to end, with and without a cache.

Letters: T tokens, B samples, H query heads, G key-value heads, L tokens of a sample, P tokens in its cache, d features.
"""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from moe_peft import ops
from moe_peft.model.cache import KVCache


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, boundaries: tuple[int, ...], window: int | None) -> Tensor:
    """Every token attends to itself and the earlier tokens of its own sample.

    Neighbouring samples of equal length share one call: their tokens already lie as a rectangle.

    Args:
        q: ``[T, H, d]``.
        k: ``[T, G, d]``.
        v: ``[T, G, d]``.
        boundaries: first token of every sample, then T.
        window: tokens a token may attend to, itself included; None: all.

    Returns:
        ``[T, H, d]``.
    """
    outputs = []
    for start, end, length in _equal_length_runs(boundaries):
        qs, ks, vs = (rearrange(x[start:end], "(b l) h d -> b h l d", l=length) for x in (q, k, v))
        if window is not None and length > window:
            mask = _causal_mask(length, 0, window, q.device)
            mixed = scaled_dot_product_attention(qs, ks, vs, attn_mask=mask, enable_gqa=True)
        else:
            mixed = ops.causal_attention(qs, ks, vs)
        outputs.append(rearrange(mixed, "b h l d -> (b l) h d"))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


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


def _equal_length_runs(boundaries: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """Token range and sample length of every run of neighbouring samples of one length."""
    runs: list[tuple[int, int, int]] = []
    for i in range(len(boundaries) - 1):
        start, end = boundaries[i], boundaries[i + 1]
        if runs and runs[-1][2] == end - start:
            runs[-1] = (runs[-1][0], end, end - start)
        else:
            runs.append((start, end, end - start))
    return runs


def _causal_mask(length: int, past: int, window: int | None, device: torch.device) -> Tensor:
    """``[L, P + L]``, True where a new token may look."""
    position = torch.arange(past, past + length, device=device)[:, None]
    slots = torch.arange(past + length, device=device)
    visible = slots <= position
    return visible if window is None else visible & (slots > position - window)
