"""torch's varlen flash attention on a GPU, without the autograd around it.

``torch.nn.attention.varlen`` wraps the same two aten operations, but takes other arguments in every version of torch,
and lets a global setting decide whether its backward repeats to the bit.

Letters: T tokens, H query heads, G key-value heads, d features.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def flash_takes(q: Tensor) -> bool:
    """Whether flash attention runs these queries ``[T, H, d]``: 16 bits, and heads as its kernels are made for."""
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16) or q.shape[2] % 8 or q.shape[2] > 256:
        return False
    return torch.cuda.get_device_capability(q.device) >= (8, 0)


def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, boundaries: Sequence[int], window: int | None
) -> tuple[Tensor, Tensor]:
    """``out [T, H, d]`` and the log-sum-exp of the scores, ``[H, T]`` in float32; arguments as ``causal_attention``."""
    out, log_z, *_ = torch.ops.aten._flash_attention_forward(
        *(x.contiguous() for x in (q, k, v)),
        *_lengths(cu_seqlens, boundaries),
        0.0,
        True,
        False,
        **_window(window, boundaries),
    )
    return out, log_z


def flash_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_z: Tensor,
    cu_seqlens: Tensor | None,
    boundaries: Sequence[int],
    window: int | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v in their shapes."""
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
    with _determinism(deterministic):
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            *(x.contiguous() for x in (d_out, q, k, v)),
            out,
            log_z,
            *_lengths(cu_seqlens, boundaries),
            0.0,
            True,
            *no_dropout,
            **_window(window, boundaries),
        )
    return dq, dk, dv


def _lengths(cu_seqlens: Tensor | None, boundaries: Sequence[int]) -> tuple[Tensor | None, Tensor | None, int, int]:
    """Boundaries and longest sample, of the queries and of the keys."""
    longest = max(end - start for start, end in pairwise(boundaries))
    return cu_seqlens, cu_seqlens, longest, longest


def _window(window: int | None, boundaries: Sequence[int]) -> dict[str, Any]:
    """How far a query looks back, when that is not simply all the way."""
    if window is None or window >= _lengths(None, boundaries)[2]:
        return {}
    return {"window_size_left": window - 1, "window_size_right": 0}


@contextmanager
def _determinism(wanted: bool) -> Iterator[None]:
    """Flash attention's backward asks a global setting of torch how to add up; it stands here for one call."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    # Not use_deterministic_algorithms, which also writes into inductor's settings.
    torch._C._set_deterministic_algorithms(wanted or before[0], warn_only=False)
    filling = torch.utils.deterministic
    filled = filling.fill_uninitialized_memory  # type: ignore[attr-defined]
    filling.fill_uninitialized_memory = filled and before[0]  # type: ignore[attr-defined]  # a pass over each output
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(before[0], warn_only=before[1])
        filling.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
