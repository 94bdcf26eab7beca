"""The losses that keep a router balanced and its logits small.

Letters: T tokens of one adapter, E experts, K top-k, L routed layers.
"""

import torch
from torch import Tensor

from moe_peft import ops

AUX_LOSS_TYPES = ("balance", "balance_per_layer", "cv2")


def router_loss(router_logits: tuple[Tensor, ...], top_k: int, kind: str) -> Tensor:
    """How unevenly tokens spread over the experts.

    Args:
        router_logits: one ``[T, E]`` a layer.
        top_k: experts a token goes to.
        kind: ``balance`` over all layers' tokens together; ``balance_per_layer``, the mean over layers, which sees a
            layer that collapsed; ``cv2``, the mean over layers of the squared coefficient of variation of the experts'
            mean probabilities (https://arxiv.org/abs/1701.06538).

    Returns:
        A scalar; the minimum of the two balance kinds is top_k, that of cv2 is 0.
    """
    if kind == "balance":
        return load_balancing_loss(torch.cat(router_logits), top_k)
    if kind == "balance_per_layer":
        return torch.stack([load_balancing_loss(logits, top_k) for logits in router_logits]).mean()
    return torch.stack([_squared_variation(logits) for logits in router_logits]).mean()


def load_balancing_loss(logits: Tensor, top_k: int) -> Tensor:
    """``E * sum_k sum_i f_{k,i} P_i`` (https://arxiv.org/abs/2101.03961, eq. 4, for each of the k choices).

    Args:
        logits: ``[T, E]``.
        top_k: K.
    """
    num_experts = logits.shape[1]
    probabilities = logits.softmax(dim=1)  # [T, E]
    _, chosen = ops.route(logits.detach(), top_k)  # [T, K]; among equals, those that tokens went to
    share = torch.nn.functional.one_hot(chosen, num_experts).to(logits.dtype).mean(dim=0)  # [K, E]
    return num_experts * (share * probabilities.mean(dim=0)).sum()


def _squared_variation(logits: Tensor) -> Tensor:
    usage = logits.softmax(dim=1).mean(dim=0)  # [E]
    return usage.var(unbiased=False) / usage.mean().square()


def z_loss(router_logits: tuple[Tensor, ...]) -> Tensor:
    """``mean(logsumexp(logits)^2)`` over tokens and layers (https://arxiv.org/abs/2202.08906, eq. 5)."""
    return torch.cat([logits.logsumexp(dim=1).square() for logits in router_logits]).mean()
