"""Where tokens go, what is counted and what the balance loss sees are one choice, among equal logits too."""

import torch

from moe_peft import ops
from moe_peft.adapters import METHODS
from moe_peft.adapters.router_losses import load_balancing_loss


def test_equal_logits_choose_the_same_experts_everywhere():
    logits = torch.zeros(64, 8, requires_grad=True)
    weights, experts = ops.route(logits, 2)
    assert weights.unique().tolist() == [0.5]
    gone_to = torch.bincount(experts.flatten(), minlength=8)
    counted = METHODS["mixlora"](num_experts=8, top_k=2).expert_counts((logits,))
    assert counted.tolist() == [gone_to.tolist()]
    load_balancing_loss(logits, 2).backward()
    assert logits.grad is not None
    assert (logits.grad[:, gone_to > 0] > 0).all()  # the loss falls where fewer tokens go there
    assert (logits.grad[:, gone_to == 0] < 0).all()
