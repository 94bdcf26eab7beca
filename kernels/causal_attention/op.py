"""Autograd for causal attention over samples laid end to end."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..compiled import runs_compiled
from ..registration import Differentiable, Operator
from . import cpu, reference
from .flash import flash_backward, flash_forward, flash_takes

_SETTINGS = "Tensor? cu_seqlens, SymInt[] boundaries, SymInt? window, bool deterministic"


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    boundaries: Sequence[int],
    window: int | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """Output, and the log-sum-exp of flash attention's scores (empty where the products ran)."""
    if flash_takes(q):
        return flash_forward(q, k, v, cu_seqlens, boundaries, window)
    chosen = cpu if runs_compiled(q) else reference
    return chosen.causal_attention_forward(q, k, v, boundaries, window), q.new_empty(0, dtype=torch.float32)


def _forward_fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    log_z = (q.shape[1], q.shape[0]) if flash_takes(q) else (0,)
    return q.new_empty(q.shape), q.new_empty(log_z, dtype=torch.float32)


def _backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    log_z: Tensor | None,
    cu_seqlens: Tensor | None,
    boundaries: Sequence[int],
    window: int | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if out is not None and log_z is not None:
        return flash_backward(d_out, q, k, v, out, log_z, cu_seqlens, boundaries, window, deterministic)
    chosen = cpu if runs_compiled(q) else reference
    return chosen.causal_attention_backward(d_out, q, k, v, boundaries, window)


def _save(arguments: Sequence[Any], results: Sequence[Tensor]) -> list[Any]:
    q, k, v, cu_seqlens, *settings = arguments
    # The products need no output: what they save is what the projections' own backward would recompute from anyway.
    return [q, k, v, *((*results, cu_seqlens) if flash_takes(q) else (None, None, None)), *settings]


_causal_attention = Differentiable(
    Operator(
        f"causal_attention(Tensor q, Tensor k, Tensor v, {_SETTINGS}) -> (Tensor, Tensor)", _forward, _forward_fake
    ),
    Operator(
        "causal_attention_backward(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor? out, Tensor? log_z, "
        f"{_SETTINGS}) -> (Tensor, Tensor, Tensor)",
        _backward,
        fake=lambda d_out, q, k, v, *_: tuple(x.new_empty(x.shape) for x in (q, k, v)),
    ),
    num_differentiated=3,
    save=_save,
    differentiate=lambda backward, kept, needs, grads: backward(grads[0], *kept),
    constants=(1,),
)


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    boundaries: Sequence[int],
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    deterministic: bool = True,
) -> Tensor:
    """Every token attends to itself and the earlier tokens of its own sample.

    On a GPU, float16 and bfloat16 run torch's varlen flash attention (https://arxiv.org/abs/2307.08691), one launch for
    all samples; everything else runs as compiled C++ or as matrix products, which save q, k and v alone for backward.

    Args:
        q: ``[T, H, d]``, samples laid end to end.
        k: ``[T, G, d]``, H a multiple of G.
        v: ``[T, G, d]``.
        boundaries: first token of every sample, then T.
        window: tokens a token may attend to, itself included; None: all.
        cu_seqlens: the boundaries as int32 on q's device, so that a model copies them once and not once a layer;
            None: copied here.
        deterministic: equal inputs give equal bits. Only flash attention's backward has another way: it adds up the
            gradient of q in whatever order its blocks finish, which is faster.

    Returns:
        ``[T, H, d]``.

    Raises:
        ValueError: when shapes do not fit each other or the boundaries.
    """
    tokens, heads, size = q.shape
    if k.shape != v.shape or k.shape[0] != tokens or k.shape[2] != size or heads % k.shape[1]:
        raise ValueError(
            f"k {list(k.shape)} and v {list(v.shape)} must be [T={tokens}, G, d={size}] with G a divisor of H={heads}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must be of one dtype, but are {q.dtype}, {k.dtype} and {v.dtype}")
    if any(end < start for start, end in itertools.pairwise(boundaries)):
        raise ValueError("boundaries must not fall")
    if boundaries[0] != 0 or boundaries[-1] != tokens:
        raise ValueError(f"boundaries {boundaries[0]}..{boundaries[-1]} must be 0..T={tokens}")
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be at least 1")
    if flash_takes(q) and cu_seqlens is None:
        cu_seqlens = torch.tensor(boundaries, dtype=torch.int32).to(q.device, non_blocking=True)
    result: Tensor = _causal_attention(q, k, v, cu_seqlens, boundaries, window, deterministic)[0]
    return result
