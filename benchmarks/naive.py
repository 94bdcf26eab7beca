"""The naive way of every operation: what a user would write in plain PyTorch, for autograd to differentiate.

LoRA factors may be of a wider dtype than the input; they are cast to it, as autocast does.

Letters: T tokens, I input features, O output features, D model, F ffn, R rank, E experts, K top-k, V vocabulary,
H query heads, G key-value heads, d features of a head, G groups of rows.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, scaled_dot_product_attention, silu


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Hugging Face's LlamaRMSNorm of ``[T, D]``; of a float64 x in float64."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``[T, F]``."""
    return silu(gate) * up


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Hugging Face's apply_rotary_pos_emb of ``[T, H, d]``, its tables in x's dtype."""
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return x * cos.to(x.dtype) + rotated * sin.to(x.dtype)


def lora_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    ranges: Sequence[tuple[int, int]],
    factors: Sequence[Sequence[tuple[Tensor, Tensor]]],
    scaling: float,
) -> list[Tensor]:
    """Projections ``[T, O_j]`` of one input ``[T, I]``, and a loop over adapters in each.

    Args:
        ranges: first token of each adapter, and one past its last.
        factors: each adapter's A ``[R, I]`` and B ``[O_j, R]`` of each projection.
    """
    outputs = []
    for j, weight in enumerate(weights):
        base = linear(x, weight)
        parts = []
        for (start, end), pairs in zip(ranges, factors, strict=True):
            a, b = (factor.to(x.dtype) for factor in pairs[j])
            parts.append(base[start:end] + x[start:end] @ a.T @ b.T * scaling)
        outputs.append(torch.cat(parts))
    return outputs


def mixlora_ffn(
    x: Tensor,
    p1: Tensor,
    p3: Tensor,
    gates: Tensor,
    experts: Tensor,
    stacks: Sequence[tuple[Tensor, Tensor]],
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Hidden features ``[T, F]`` and what the down experts add ``[T, D]``, in a loop over experts.

    The frozen products are given once a token, which spares this way what the original spends on W2 an expert.

    Args:
        x: ``[T, D]``; p1 and p3, its frozen products, ``[T, F]``.
        gates: ``[T, K]``, and so are the experts.
        stacks: A ``[E, R, in]`` and B ``[E, out, R]`` of the gate, up and down projections.
    """

    def lowered(rows: Tensor, stack: tuple[Tensor, Tensor]) -> Tensor:
        a, b = (factor[expert].to(x.dtype) for factor in stack)
        return rows @ a.T @ b.T * scaling

    gate, up, down = stacks
    hidden, delta = torch.zeros_like(p1), torch.zeros_like(x)
    for expert in range(gate[0].shape[0]):
        tokens, slots = torch.where(experts == expert)
        rows = x[tokens]
        u1 = p1[tokens] + lowered(rows, gate)
        u3 = p3[tokens] + lowered(rows, up)
        h = silu(u1) * u3
        share = gates[tokens, slots, None].to(x.dtype)
        hidden.index_add_(0, tokens, h * share)
        delta.index_add_(0, tokens, lowered(h, down) * share)
    return hidden, delta


def grouped_matmul(x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """Rows ``[T, I]`` sorted by group times their group's matrix ``[G, O, I]``, in a loop over groups."""
    ends = offsets.tolist()
    parts = [x[start:end] @ weight.to(x.dtype).T for weight, (start, end) in zip(weights, pairwise(ends), strict=True)]
    return torch.cat(parts)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Loss of each row ``[T]`` from its logits ``[T, V]``, at least float32 as Hugging Face takes them."""
    logits = linear(hidden, weight)
    return cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="none")


def causal_attention(q: Tensor, k: Tensor, v: Tensor, boundaries: Sequence[int]) -> Tensor:
    """torch's SDPA of one sample after another; q ``[T, H, d]``, k and v ``[T, G, d]``."""
    outputs = []
    for start, end in pairwise(boundaries):
        queries, keys, values = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))  # [1, H or G, L, d]
        is_grouped = q.shape[1] != k.shape[1]
        mixed = scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=is_grouped)
        outputs.append(mixed[0].transpose(0, 1))
    return torch.cat(outputs)


def wide_linear(x: Tensor, weight: Tensor) -> Tensor:
    """``[T, D]`` times a router's ``[E, D]`` in the router's wider dtype."""
    return linear(x.to(weight.dtype), weight)
