"""Autograd for a router's choice of experts."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..compiled import runs_compiled
from ..registration import Differentiable, Operator
from . import cpu, reference


def _runs_compiled(x: Tensor) -> bool:
    return x.dtype == torch.float32 and runs_compiled(x)


def _forward(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    return (cpu if _runs_compiled(logits) else reference).route_forward(logits, top_k)


def _backward(d_weights: Tensor, kept: Tensor, experts: Tensor, num_experts: int) -> Tensor:
    return (cpu if _runs_compiled(kept) else reference).route_backward(d_weights, kept, experts, num_experts)


def _fake(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, num_experts = logits.shape
    experts = logits.new_empty(rows, top_k, dtype=torch.int64)
    return logits.new_empty(rows, top_k), experts, logits.new_empty(rows, num_experts if top_k == 1 else 0)


def _save(arguments: Sequence[Any], results: Sequence[Tensor]) -> list[Any]:
    logits, top_k = arguments
    weights, experts, probabilities = results
    return [probabilities if top_k == 1 else weights, experts, logits.shape[1]]


_route = Differentiable(
    Operator("route(Tensor logits, int top_k) -> (Tensor, Tensor, Tensor)", _forward, _fake),
    Operator(
        "route_backward(Tensor d_weights, Tensor kept, Tensor experts, int num_experts) -> Tensor",
        _backward,
        lambda d_weights, kept, experts, num_experts: kept.new_empty(kept.shape[0], num_experts),
    ),
    num_differentiated=1,
    save=_save,
    differentiate=lambda backward, kept, needs, grads: (backward(grads[0], *kept),),
    constants=(1, 2),
)


def route(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Weights and indices of each token's experts.

    Args:
        logits: ``[N, E]``, at least float32.
        top_k: K.

    Returns:
        Weights ``[N, K]`` and LongTensor experts ``[N, K]``, best first. The weights are the chosen probabilities,
        renormalised to sum to one; for K = 1 they stay as they are, or the router would get no gradient from the task.

    Raises:
        ValueError: when K is below 1 or above E.
    """
    if not 1 <= top_k <= logits.shape[1]:
        raise ValueError(f"top_k={top_k} must be from 1 to the number of experts, {logits.shape[1]}")
    weights, experts, _ = _route(logits, top_k)
    return weights, experts
