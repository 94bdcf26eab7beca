"""Cross-entropy against the frozen head in row chunks: no ``[N, V]`` tensor ever exists.

torch has a ``linear_cross_entropy`` of its own from 2.13 on. It is not used: 2048 rows of 576 against 49152 words in
bf16 take it 0.70 to 2.7 s in chunks, by its accuracy setting, or 0.59 s and 576 MB without; here they take 0.42 s and
less than 100 MB (on two Zen 5 cores, gradient included).

Letters: N rows with a label, D model, V vocabulary, c rows of a chunk, r rows of a block.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..products import matmul_t

# Both products run at GEMM speed from here on; the chunk's logits are 25 MB in bf16 at 49k words.
CHUNK_ROWS = 256
# Rows whose float32 logits stay in the cache while they are passed over: 1.5 MB at 49k words.
BLOCK_ROWS = 8


def linear_cross_entropy_forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """``in_chunks`` with plain PyTorch."""
    return in_chunks(hidden, weight, targets, with_gradient, cross_entropy_rows)


def in_chunks(
    hidden: Tensor, weight: Tensor, targets: Tensor, with_gradient: bool, fill_rows: Callable[..., None]
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each row, and its gradient with respect to that row.

    The head is frozen, so the gradient is known up to one factor a row as soon as the logits are: taking it here saves
    the backward from computing the logits again.

    Args:
        hidden: ``[N, D]``.
        weight: ``[V, D]``.
        targets: ``[N]``, each in ``0..V-1``.
        with_gradient: also return ``d nll / d hidden``.
        fill_rows: as ``cross_entropy_rows``.

    Returns:
        nll ``[N]`` (at least float32) and the gradient ``[N, D]`` in hidden's dtype, ``[0, D]`` when not asked for.
    """
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    nll = torch.empty(hidden.shape[0], dtype=wide, device=hidden.device)
    gradient = hidden.new_empty(hidden.shape if with_gradient else (0, hidden.shape[1]))
    for start in range(0, hidden.shape[0], CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        logits = matmul_t(hidden[rows], weight)  # [c, V]
        fill_rows(logits, targets[rows], nll[rows], with_gradient)
        if with_gradient:
            gradient[rows] = matmul_t(logits, weight.T)
    return nll, gradient


def cross_entropy_rows(logits: Tensor, targets: Tensor, nll: Tensor, with_gradient: bool) -> None:
    """Fill nll ``[c]``, and put the gradient of the logits ``[c, V]`` in their place if there is to be one."""
    parts = [x.split(BLOCK_ROWS) for x in (logits, targets[:, None], nll[:, None])]
    for some_logits, some_targets, some_nll in zip(*parts, strict=True):
        _row_block(some_logits, some_targets, some_nll, with_gradient)


def _row_block(logits: Tensor, targets: Tensor, nll: Tensor, with_gradient: bool) -> None:
    """Fill nll ``[r, 1]``, and put the gradient of the logits ``[r, V]`` in their place."""
    exact = logits.to(nll.dtype)
    highest = exact.amax(dim=1, keepdim=True)
    nll.copy_(highest - exact.gather(1, targets))
    p = torch.softmax(exact, 1)  # one fused pass, several times faster than exponentials and a sum
    nll.sub_(p.amax(dim=1, keepdim=True).log_())  # the highest logit's probability is 1 / z
    if with_gradient:
        logits.copy_(p.scatter_add_(1, targets, torch.full_like(nll, -1.0)))
