"""Causal grouped-query attention over samples laid end to end as plain matrix products, in blocks of queries.

torch's CPU flash attention is slower, in 16-bit types by half forward and backward. Beside the
products it is passes over the scores that cost: so a block's scores stay in the cache, softmax and its gradient are
torch's fused kernels, and nothing right of the diagonal block is computed.

Letters: T tokens, B samples of a rectangle, L their length, H query heads, G key-value heads, n = H / G, d features,
M = B * G products of a batch, q queries of a block, s keys that they see.
"""

import functools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..invariance import is_batch_invariant
from ..products import matmul_t, products_of_16_bits
from ..rectangles import rectangles

BLOCK = 64
# Up to this length the scores above the diagonal cost less than a second block's launches.
SHORT = 128
# From this length a head of a sample is work enough for a product of its own, and its blocks may be larger.
LONG = 1024
LONG_BLOCK = 256
# Scores of a block over all of a batch's products: 16 MB in float32 for a CPU's cache, 256 MB for a GPU's memory.
BATCH_SCORES = {"cpu": 1 << 22, "cuda": 1 << 26}


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
    wide = _wide(q.dtype)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for rectangle in rectangles(tuple(boundaries), is_batch_invariant()):
        room = rectangle.room(out)
        tensors = [rectangle.take(x) for x in (q, k, v)]  # [B, L, ...]
        for q_part, k_part, v_part, out_part in _batches(*tensors, room):
            share = q_part.shape[2] // k_part.shape[2]
            rows, keys, values = _side_by_side(q_part, share), _side_by_side(k_part, 1), _side_by_side(v_part, 1)
            scores = _Scores(rows, keys)
            mixed = torch.empty_like(rows)
            for first, start, end, mask in _blocks(rectangle.length, window, share, wide, q.device):
                own = slice(start * share, end * share)
                p = scores.probabilities(own, slice(first, end), mask)  # [M, q * n, s]
                torch.bmm(p, values[:, first:end], out=mixed[:, own])
            _write(out_part, mixed, share)
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
    for rectangle in rectangles(tuple(boundaries), is_batch_invariant()):
        rooms = [rectangle.room(x) for x in gradients]
        tensors = [rectangle.take(x) for x in (q, k, v)]  # [B, L, ...]
        for q_part, k_part, v_part, d_part, dq_part, dk_part, dv_part in _batches(
            *tensors, rectangle.take_filled(d_out), *rooms
        ):
            share = q_part.shape[2] // k_part.shape[2]
            rows, d_rows = _side_by_side(q_part, share), _side_by_side(d_part, share)  # [M, L * n, d]
            keys, values = _side_by_side(k_part, 1), _side_by_side(v_part, 1)  # [M, L, d]
            scores = _Scores(rows, keys)
            dk, dv = torch.zeros((2, *keys.shape), dtype=wide, device=q.device)
            dq = torch.empty_like(rows)
            for first, start, end, mask in _blocks(rectangle.length, window, share, wide, q.device):
                own, seen = slice(start * share, end * share), slice(first, end)
                p = scores.probabilities(own, seen, mask)  # [M, q * n, s]
                dp = d_rows[:, own] @ values[:, seen].mT
                d_scores = torch._softmax_backward_data(dp, p, -1, p.dtype)  # p * (dp - the row's sum of p * dp)
                torch.bmm(d_scores, keys[:, seen], out=dq[:, own])
                dv[:, seen] += p.mT @ d_rows[:, own]
                dk[:, seen] += d_scores.mT @ rows[:, own]
            _write(dq_part, dq.mul_(scale), share)
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


@functools.lru_cache(maxsize=256)  # the layers of a step ask for the same ones
def _blocks(
    length: int, window: int | None, share: int, wide: torch.dtype, device: torch.device
) -> tuple[tuple[int, int, int, Tensor], ...]:
    """First key, first query and end of every block; and what its last keys' scores are raised by, 0 or -inf."""
    size = _block_size(length)
    blocks: list[tuple[int, int, int, Tensor]] = []
    masks: dict[tuple[int, int], Tensor] = {}
    for start in range(0, length, size):
        end = min(start + size, length)
        first = 0 if window is None else max(0, start - window + 1)
        queries, past = end - start, 0 if window is None or window >= length else start - first
        if (queries, past) not in masks:
            mask = torch.full((queries, past + queries), -torch.inf, dtype=wide, device=device)
            mask = mask.triu(past + 1) + mask.tril(past - (window or length))
            masks[queries, past] = mask.repeat_interleave(share, 0)  # [q * n, past + q]
        blocks.append((first, start, end, masks[queries, past]))
    return tuple(blocks)


class _Scores:
    """Attention's probabilities of a batch, computed block by block in at least float32.

    Args:
        rows: queries ``[M, L * n, d]``.
        keys: ``[M, L, d]``.
    """

    def __init__(self, rows: Tensor, keys: Tensor) -> None:
        wide, scale = _wide(rows.dtype), keys.shape[2] ** -0.5
        self._dtype = rows.dtype
        # A power of two changes no digit of the keys, which so stay values of their own dtype; often that is all of it.
        power = 2.0 ** math.floor(math.log2(scale))
        self._rest = scale / power
        self._rows, self._keys = rows.to(wide), keys.to(wide) * power

    def probabilities(self, own: slice, seen: slice, mask: Tensor) -> Tensor:
        """``[M, q * n, s]`` in the queries' own dtype; ``mask`` raises the last of the keys' scores."""
        with products_of_16_bits(self._dtype):
            scores = _product(self._rows[:, own], self._keys[:, seen])
        if self._rest != 1:
            scores *= self._rest
        scores[..., -mask.shape[1] :] += mask
        return torch.softmax(scores, -1, out=scores).to(self._dtype)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a b^T`` of ``[M, rows, d]`` and ``[M, columns, d]``."""
    return matmul_t(a[0], b[0])[None] if a.shape[0] == 1 else a @ b.mT


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
