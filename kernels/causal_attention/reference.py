"""Causal grouped-query attention over samples laid end to end as plain matrix products, in blocks of queries.

torch's CPU flash attention is slower, in 16-bit types by half forward and backward. Beside the
products it is passes over the scores that cost: so a block's scores stay in the cache, softmax and its gradient are
torch's fused kernels, and nothing right of the diagonal block is computed.

Letters: T tokens, B samples of a rectangle, L their length, H query heads, G key-value heads, n = H / G, d features,
M = B * G products of a batch, q queries of a block, s keys that they see.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..products import matmul_t
from .rectangles import rectangles

BLOCK = 64
# Up to this length the scores above the diagonal cost less than a second block's launches.
SHORT = 128
# From this length a head of a sample is work enough for a product of its own, and its blocks may be larger.
LONG = 1024
LONG_BLOCK = 256
# Scores of a block over all of a batch's products: 4 MB in float32 for a CPU's cache, 256 MB for a GPU's memory.
BATCH_SCORES = {"cpu": 1 << 20, "cuda": 1 << 26}


def causal_attention_forward(q: Tensor, k: Tensor, v: Tensor, boundaries: Sequence[int], window: int | None) -> Tensor:
    """``softmax(d^-1/2 q k^T) v`` below the diagonal of every sample.

    Scores and softmax are taken in at least float32: where attention is sharp, scores are large, and rounding them to
    16 bits would change their exponentials by a factor.

    Args:
        q: ``[T, H, d]``.
        k: ``[T, G, d]``.
        v: ``[T, G, d]``.
        boundaries: first token of every sample, then T.
        window: tokens a token may attend to, itself included; None: all.

    Returns:
        ``[T, H, d]``.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for rectangle in rectangles(tuple(boundaries)):
        room = rectangle.room(out)
        tensors = [rectangle.take(x) for x in (q, k, v)]  # [B, L, ...]
        for q_part, k_part, v_part, out_part in _batches(*tensors, room):
            keys, values = _side_by_side(k_part, 1), _side_by_side(v_part, 1)  # [M, L, d]
            keys = keys.to(_wide(q.dtype)) * q.shape[2] ** -0.5
            share = q_part.shape[2] // k_part.shape[2]
            for first, start, end, mask in _blocks(rectangle.length, window, share, keys):
                q_rows = _side_by_side(q_part[:, start:end], share)  # [M, q * n, d]
                p = _probabilities(q_rows, keys[:, first:end], mask)
                _write(out_part[:, start:end], p @ values[:, first:end], share)
        rectangle.put(out, room)
    return out


def causal_attention_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, boundaries: Sequence[int], window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``causal_attention_forward``, whose probabilities are computed again.

    The query heads that share a key-value head stand as further rows of one product, so their gradients of k and v add
    up inside it.

    Args:
        d_out: gradient of out, ``[T, H, d]``.
        q: ``[T, H, d]``.
        k: ``[T, G, d]``.
        v: ``[T, G, d]``.
        boundaries: first token of every sample, then T.
        window: tokens a token may attend to, itself included; None: all.

    Returns:
        dq ``[T, H, d]``, dk and dv ``[T, G, d]``.
    """
    wide, scale = _wide(q.dtype), q.shape[2] ** -0.5
    gradients = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    for rectangle in rectangles(tuple(boundaries)):
        rooms = [rectangle.room(x) for x in gradients]
        tensors = [rectangle.take(x) for x in (q, k, v)]  # [B, L, ...]
        for q_part, k_part, v_part, d_part, dq_part, dk_part, dv_part in _batches(
            *tensors, rectangle.take_filled(d_out), *rooms
        ):
            keys, values = _side_by_side(k_part, 1), _side_by_side(v_part, 1)  # [M, L, d]
            wide_keys = keys.to(wide) * scale
            dk, dv = torch.zeros((2, *keys.shape), dtype=wide, device=q.device)
            share = q_part.shape[2] // k_part.shape[2]
            for first, start, end, mask in _blocks(rectangle.length, window, share, wide_keys):
                q_rows = _side_by_side(q_part[:, start:end], share)  # [M, q * n, d]
                d_rows = _side_by_side(d_part[:, start:end], share)
                p = _probabilities(q_rows, wide_keys[:, first:end], mask)  # [M, q * n, s]
                dp = d_rows @ values[:, first:end].mT
                d_scores = torch._softmax_backward_data(dp, p, -1, p.dtype)  # p * (dp - the row's sum of p * dp)
                _write(dq_part[:, start:end], (d_scores @ keys[:, first:end]).mul_(scale), share)
                dv[:, first:end] += p.mT @ d_rows
                dk[:, first:end] += d_scores.mT @ q_rows
            _write(dk_part, dk.mul_(scale), 1)
            _write(dv_part, dv, 1)
        for gradient, room in zip(gradients, rooms, strict=True):
            rectangle.put(gradient, room)
    dq, dk, dv = gradients
    return dq, dk, dv


def _batches(q: Tensor, k: Tensor, *others: Tensor) -> Iterator[list[Tensor]]:
    """Parts of tensors ``[B, L, H or G, d]`` whose products run at once: some samples, or one head of a long one."""
    num_samples, length, num_heads, _ = q.shape
    groups = k.shape[2]
    if length >= LONG and q.device.type == "cpu":
        for sample in range(num_samples):
            yield from zip(*(x[sample : sample + 1].chunk(groups, 2) for x in (q, k, *others)), strict=True)
        return
    scores = min(_block_size(length), length) * length * num_heads
    most = max(1, BATCH_SCORES["cuda" if q.is_cuda else "cpu"] // scores)
    yield from zip(*(x.chunk(-(-num_samples // most)) for x in (q, k, *others)), strict=True)


def _block_size(length: int) -> int:
    if length <= SHORT:
        return length
    return BLOCK if length < LONG else LONG_BLOCK


def _side_by_side(x: Tensor, share: int) -> Tensor:
    """``[B, q, G * n, d]`` to ``[B * G, q * n, d]``, contiguous."""
    samples, tokens, heads, size = x.shape
    groups = heads // share
    return x.reshape(samples, tokens, groups, share, size).transpose(1, 2).reshape(-1, tokens * share, size)


def _write(out: Tensor, x: Tensor, share: int) -> None:
    """``[B * G, q * n, d]`` into its place in ``[B, q, G * n, d]``."""
    samples, tokens, heads, _ = out.shape
    groups = heads // share
    out.unflatten(2, (groups, share)).copy_(x.view(samples, groups, tokens, share, -1).transpose(1, 2))


def _blocks(length: int, window: int | None, share: int, like: Tensor) -> Iterator[tuple[int, int, int, Tensor]]:
    """First key, first query and end of every block; and what its last keys' scores are raised by, 0 or -inf."""
    size = _block_size(length)
    shape, mask = (0, 0), like
    for start in range(0, length, size):
        end = min(start + size, length)
        first = 0 if window is None else max(0, start - window + 1)
        queries, past = end - start, 0 if window is None or window >= length else start - first
        if shape != (queries, past):
            shape = (queries, past)
            mask = like.new_full((queries, past + queries), -torch.inf)
            mask = mask.triu(past + 1) + mask.tril(past - (window or length))
            mask = mask.repeat_interleave(share, 0)  # [q * n, past + q]
        yield first, start, end, mask


def _probabilities(q_rows: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
    """``[M, q * n, s]`` in q's dtype from ``[M, q * n, d]`` and the scaled keys ``[M, s, d]`` in a wide one."""
    scores = _product(q_rows.to(keys.dtype), keys)
    scores[..., -mask.shape[1] :] += mask
    return torch.softmax(scores, -1, out=scores).to(q_rows.dtype)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a b^T`` of ``[M, rows, d]`` and ``[M, columns, d]``."""
    return matmul_t(a[0], b[0])[None] if a.shape[0] == 1 else a @ b.mT


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
