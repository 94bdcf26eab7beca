"""A router's choice of experts in compiled C++, in float32.

Letters: N rows, E experts, K top-k.
"""

import torch
from torch import Tensor

from ..compiled import CompiledFunction

_forward = CompiledFunction("route_forward", "ppppiii")
_backward = CompiledFunction("route_backward", "ppppiii")


def route_forward(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference's; of equal probabilities the first is chosen."""
    rows, size = logits.shape
    weights, experts = logits.new_empty(rows, top_k), logits.new_empty(rows, top_k, dtype=torch.int64)
    probabilities = logits.new_empty(rows, size if top_k == 1 else 0)
    wanted = probabilities if top_k == 1 else None
    _forward(torch.float32, logits.contiguous(), weights, experts, wanted, rows, size, top_k)
    return weights, experts, probabilities


def route_backward(d_weights: Tensor, kept: Tensor, experts: Tensor, num_experts: int) -> Tensor:
    """As the reference's."""
    rows, top_k = experts.shape
    d_logits = kept.new_empty(rows, num_experts)
    tensors = d_weights.contiguous(), kept.contiguous(), experts.contiguous()
    _backward(torch.float32, *tensors, d_logits, rows, num_experts, top_k)
    return d_logits
