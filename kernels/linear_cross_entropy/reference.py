"""Cross-entropy against the frozen head in row chunks: no ``[N, V]`` tensor ever exists.

Letters: N rows with a label, D model, V vocabulary, c rows of a chunk.
"""

import torch
from torch import Tensor

# 128 rows of a 49k vocabulary are 12 MB in bf16: large enough for GEMM speed, small enough to be reused.
CHUNK_ROWS = 128


def linear_cross_entropy_forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Negative log-likelihood of each row, and its gradient with respect to that row.

    The head is frozen, so the gradient is known up to one factor a row as soon as the logits are: taking it here saves
    the backward from computing the logits again.

    Args:
        hidden: ``[N, D]``.
        weight: ``[V, D]``.
        targets: ``[N]``, each in ``0..V-1``.
        with_gradient: also return ``d nll / d hidden``.

    Returns:
        nll ``[N]`` (at least float32) and the gradient ``[N, D]`` in hidden's dtype, or None.
    """
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    nll = torch.empty(hidden.shape[0], dtype=wide, device=hidden.device)
    gradient = torch.empty_like(hidden) if with_gradient else None
    for start in range(0, hidden.shape[0], CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        exponentials = (hidden[rows] @ weight.T).to(wide)  # [c, V], logits so far; then in place, for its size
        row_targets = targets[rows, None]
        target_logits = exponentials.gather(1, row_targets)
        highest = exponentials.amax(dim=1, keepdim=True)
        z = exponentials.sub_(highest).exp_().sum(dim=1, keepdim=True)  # [c, 1]
        nll[rows] = (z.log() + highest - target_logits).squeeze(1)
        if gradient is not None:
            probabilities = exponentials.div_(z)
            probabilities.scatter_add_(1, row_targets, torch.full_like(z, -1.0))
            torch.mm(probabilities.to(hidden.dtype), weight, out=gradient[rows])
    return nll, gradient
