"""Causal grouped-query attention over samples laid end to end in compiled C++.

Letters: T tokens, H query heads, G key-value heads, d features.
"""

from array import array
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..compiled import CompiledFunction

_forward = CompiledFunction("causal_attention_forward", "pppppiiiiii")
_backward = CompiledFunction("causal_attention_backward", "ppppppppiiiiii")


def causal_attention_forward(q: Tensor, k: Tensor, v: Tensor, boundaries: Sequence[int], window: int | None) -> Tensor:
    """As the reference's, with the softmax in float32; probabilities are rounded to q's dtype where they meet v."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out = torch.empty_like(q)
    _forward(q.dtype, q, k, v, out, *_settings(q, k, boundaries, window))
    return out


def causal_attention_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, boundaries: Sequence[int], window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference's, with the softmax and all sums in float32; products are of numbers in q's dtype."""
    d_out, q, k, v = d_out.contiguous(), q.contiguous(), k.contiguous(), v.contiguous()
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    _backward(q.dtype, d_out, q, k, v, dq, dk, dv, *_settings(q, k, boundaries, window))
    return dq, dk, dv


def _settings(q: Tensor, k: Tensor, boundaries: Sequence[int], window: int | None) -> "tuple[array[int] | int, ...]":
    """What follows the tensors in C++."""
    longest = max((end - start for start, end in pairwise(boundaries)), default=0)
    _, heads, size = q.shape
    return array("q", boundaries), len(boundaries) - 1, longest, heads, k.shape[1], size, window or 0
