"""The cross-entropy of a chunk's logits in one launch, which leaves their gradient in their place.

Letters: N rows with a label, D model, V vocabulary, c rows of a chunk.
"""

# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..products import matmul_into
from ..registration import on_its_device

# What a chunk's logits may take; the two products around a launch run at full speed long before.
CHUNK_BYTES = 256 << 20
MAX_BLOCK = 4096


@triton.jit
def _cross_entropy(logits, targets, nll, row_stride, V, BLOCK: tl.constexpr, WITH_GRADIENT: tl.constexpr):
    """One row a program: nll ``[c]`` of logits ``[c, V]``, which become ``softmax(logits) - onehot(target)``."""
    row = tl.program_id(0)
    x = logits + row.to(tl.int64) * row_stride
    target = tl.load(targets + row)
    lane = tl.arange(0, BLOCK)
    # Each lane keeps its own running maximum and sum; they are brought together once.
    highest = tl.full((BLOCK,), -3.0e38, tl.float32)
    z = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        value = tl.load(x + start + lane, mask=start + lane < V, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(highest, value)
        z = z * tl.exp(highest - higher) + tl.exp(value - higher)
        highest = higher
    target_logit = tl.load(x + target).to(tl.float32)
    top = tl.max(highest, 0)
    total = tl.sum(z * tl.exp(highest - top), 0)
    tl.store(nll + row, tl.log(total) + top - target_logit)
    if WITH_GRADIENT:
        tl.debug_barrier()  # every thread has read the target's logit before one overwrites it
        for start in range(0, V, BLOCK):
            column = start + lane
            value = tl.load(x + column, mask=column < V, other=-float("inf")).to(tl.float32)
            p = tl.exp(value - top) / total
            gradient = tl.where(column == target, p - 1.0, p)
            tl.store(x + column, gradient.to(logits.dtype.element_ty), mask=column < V)


@on_its_device
def linear_cross_entropy_forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """As the reference's function of this name; logits pass through memory twice, and their gradient once."""
    num_rows, vocab = hidden.shape[0], weight.shape[0]
    nll = torch.empty(num_rows, dtype=torch.float32, device=hidden.device)
    gradient = hidden.new_empty(hidden.shape if with_gradient else (0, hidden.shape[1]))
    if num_rows == 0:
        return nll, gradient
    chunk_rows = min(num_rows, max(1, CHUNK_BYTES // (vocab * hidden.element_size())))
    buffer = hidden.new_empty(chunk_rows, vocab)
    block = min(MAX_BLOCK, triton.next_power_of_2(vocab))
    targets = targets.contiguous()
    for start in range(0, num_rows, chunk_rows):
        rows = slice(start, min(start + chunk_rows, num_rows))
        logits = buffer[: rows.stop - start]  # [c, V]
        matmul_into(logits, hidden[rows], weight.T)
        _cross_entropy[(len(logits),)](
            logits, targets[rows], nll[rows], logits.stride(0), vocab, block, with_gradient, num_warps=8
        )
        if with_gradient:
            matmul_into(gradient[rows], logits, weight)
    return nll, gradient
