"""A router's choice of experts in plain PyTorch.

Letters: N rows, E experts, K top-k.
"""

from torch import Tensor


def route_forward(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights ``[N, K]``, experts ``[N, K]``, best first, and what backward needs beside them.

    That is all probabilities, ``[N, E]``, for K = 1, and nothing, ``[N, 0]``, else: renormalised weights are a softmax
    of the chosen logits alone.
    """
    probabilities = logits.softmax(dim=1)
    weights, experts = probabilities.topk(top_k, dim=1)
    if top_k == 1:
        return weights, experts, probabilities
    return weights / weights.sum(dim=1, keepdim=True), experts, logits.new_empty(logits.shape[0], 0)


def route_backward(d_weights: Tensor, kept: Tensor, experts: Tensor, num_experts: int) -> Tensor:
    """Of the logits, ``[N, E]``.

    Args:
        d_weights: ``[N, K]``.
        kept: for K = 1 all probabilities, ``[N, E]``; else the weights.
        experts: ``[N, K]``.
        num_experts: E.
    """
    if experts.shape[1] == 1:
        inner = kept.gather(1, experts) * d_weights
        return (kept * -inner).scatter_add_(1, experts, inner)
    d_chosen = kept * (d_weights - (d_weights * kept).sum(dim=1, keepdim=True))
    return kept.new_zeros(kept.shape[0], num_experts).scatter_(1, experts, d_chosen)
