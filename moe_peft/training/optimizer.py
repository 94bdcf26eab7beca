"""An adapter's optimizer and its learning rate over time."""

import math

import torch
from torch import nn

from moe_peft.config import AdapterJob
from moe_peft.model.llama import LlamaForCausalLM


def build_optimizer(model: LlamaForCausalLM, job: AdapterJob) -> torch.optim.Optimizer:
    """The job's optimizer over its adapter's parameters, fused into one launch.

    Weight decay spares routers (unless ``decay_router``) and 1-D weights. With a ``loraplus_lr_ratio`` the factors
    lora_B (AdaLoRA's, too), and as in PEFT 1-D weights, are groups of their own, which have it as their ``lr_ratio``
    (https://arxiv.org/abs/2402.12354).
    """
    grouped: dict[tuple[bool, float], dict[int, nn.Parameter]] = {}
    for key, weight, _ in model.named_adapter_weights(job.name):
        is_vector = weight.dim() < 2
        is_spared = is_vector or (job.adapter.is_router(key) and not job.decay_router)
        ratio = job.loraplus_lr_ratio if is_vector or ".lora_B" in key else 1.0
        grouped.setdefault((is_spared, ratio), {})[id(weight)] = weight
    groups = [
        {
            "params": list(weights.values()),
            "weight_decay": 0.0 if is_spared else job.weight_decay,
            "lr": job.lr * ratio,
            "lr_ratio": ratio,
        }
        for (is_spared, ratio), weights in sorted(grouped.items(), key=lambda item: item[0])
    ]
    if job.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=job.lr, momentum=job.momentum, fused=True)
    return torch.optim.AdamW(groups, lr=job.lr, betas=job.betas, eps=job.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group the rate of the next step, times its own ratio."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_ratio"]


def learning_rate(job: AdapterJob, step: int, num_steps: int) -> float:
    """The rate of one optimizer step.

    Args:
        job: its peak rate, warm-up and schedule.
        step: counted from 0.
        num_steps: of the whole training.

    Returns:
        A linear rise over the warm-up steps, the first of which is not zero; then constant, or falling to 0 in a line
        or a half cosine.
    """
    # Rounded first: 0.07 * 100 comes out as 7.000000000000001, but means 7 steps.
    warmup = job.warmup_steps or math.ceil(round(job.warmup_ratio * num_steps, 6))
    if step < warmup:
        return job.lr * (step + 1) / warmup
    done = (step - warmup) / max(num_steps - warmup, 1)
    if job.lr_scheduler == "linear":
        return job.lr * (1 - done)
    if job.lr_scheduler == "cosine":
        return job.lr * 0.5 * (1 + math.cos(math.pi * done))
    return job.lr
