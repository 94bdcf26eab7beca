"""Autograd for the mixture of LoRA experts in a SwiGLU layer."""

from typing import Any

import torch
from torch import Tensor

from .reference import ExpertFactors, FfnInputs, mixlora_ffn_backward, mixlora_ffn_forward


class _MixLoraFfn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scaling: float, *tensors: Tensor | None) -> tuple[Tensor, Tensor | None]:
        hidden, lowered, a1, a3 = mixlora_ffn_forward(_inputs(scaling, *tensors))
        ctx.scaling = scaling
        ctx.save_for_backward(*tensors, a1, a3)
        return hidden, lowered

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        *tensors, a1, a3 = ctx.saved_tensors
        found = mixlora_ffn_backward(_inputs(ctx.scaling, *tensors), grads[0], grads[1], a1, a3)
        gate, up = found.gate or (None, None), found.up or (None, None)
        return None, found.dx, found.dp1, found.dp3, found.dgates, None, *gate, *up, found.down_a, None, None


def _inputs(scaling: float, *tensors: Any) -> FfnInputs:
    """The tensors in the order in which autograd takes them: a stack's A and B each for themselves."""
    x, p1, p3, gates, experts, gate_a, gate_b, up_a, up_b, down_a, x_mask, h_mask = tensors
    gate, up = _factors(gate_a, gate_b), _factors(up_a, up_b)
    return FfnInputs(x, p1, p3, gates, experts, gate, up, down_a, scaling, x_mask, h_mask)


def _factors(lora_a: Tensor | None, lora_b: Tensor | None) -> ExpertFactors | None:
    return ExpertFactors(lora_a, lora_b) if lora_a is not None and lora_b is not None else None


def mixlora_ffn(
    x: Tensor,
    p1: Tensor,
    p3: Tensor,
    gates: Tensor,
    experts: Tensor,
    *,
    gate: ExpertFactors | None,
    up: ExpertFactors | None,
    down: ExpertFactors | None,
    scaling: float,
    x_mask: Tensor | None = None,
    h_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The mixture's hidden features, and what its down experts add after the frozen down projection.

    Args:
        x: ``[N, D]``, tokens of one adapter.
        p1: ``W1 x``, ``[N, F]``.
        p3: ``W3 x``, ``[N, F]``.
        gates: routing weights ``[N, K]``, differentiable.
        experts: LongTensor ``[N, K]``, distinct in a row.
        gate: experts on the gate projection, or None; likewise up and down. At least one is given.
        scaling: factor of every low-rank product.
        x_mask: dropout mask of the gate and up experts' input, ``[N, D]``, or None.
        h_mask: dropout mask of the down experts' input, ``[N, F]``, or None.

    Returns:
        h ``[N, F]`` and delta ``[N, D]`` (None without down experts): the layer's output is ``W2 h + delta``.
    """
    factors = [factor for stack in (gate, up) for factor in ((stack.lora_a, stack.lora_b) if stack else (None, None))]
    down_a = down.lora_a if down else None
    hidden, lowered = _MixLoraFfn.apply(scaling, x, p1, p3, gates, experts, *factors, down_a, x_mask, h_mask)
    if down is None or lowered is None:
        return hidden, None
    return hidden, lowered @ down.flat_b(x.dtype).mul(scaling)
