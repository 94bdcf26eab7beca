"""The mixture of LoRA experts in a SwiGLU layer, by the combined algebra, in plain PyTorch.

For a token x with selected experts e(1..K), weights g_k and the frozen products p1 = W1 x, p3 = W3 x (computed once)::

    u1_k = p1 + s B1_e A1_e x      u3_k = p3 + s B3_e A3_e x      h_k = silu(u1_k) * u3_k
    h    = sum_k g_k h_k           C_e  = g_k A2_e h_k

so that the layer's output is ``W2 h + s sum_e B2_e C_e``: W2, too, runs once a token. All experts' factors are one
dense GEMM masked by the routing; nothing per expert of width F is kept for backward.

Letters: N tokens of one adapter, D model, F ffn, E experts, K top-k, R rank, ER all experts' ranks side by side.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ExpertFactors:
    """Stacked LoRA factors of the experts on one projection.

    Args:
        lora_a: ``[E, R, in]``.
        lora_b: ``[E, out, R]``.
    """

    lora_a: Tensor
    lora_b: Tensor

    def flat_a(self, dtype: torch.dtype) -> Tensor:
        """All A side by side, ``[ER, in]``."""
        return self.lora_a.to(dtype).flatten(0, 1)

    def flat_b(self, dtype: torch.dtype) -> Tensor:
        """All transposed B side by side, ``[ER, out]``."""
        return self.lora_b.to(dtype).transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True)
class FfnInputs:
    """What the mixture is computed from.

    Args:
        x: ``[N, D]``.
        p1: ``W1 x``, ``[N, F]``.
        p3: ``W3 x``, ``[N, F]``.
        gates: routing weights ``[N, K]``.
        experts: selected experts ``[N, K]``, distinct in a row.
        gate: factors of the gate projection's experts, or None.
        up: factors of the up projection's experts, or None.
        down_a: A of the down projection's experts, ``[E, R, F]``, or None.
        scaling: s.
        x_mask: dropout mask of the experts' input ``[N, D]``, or None.
        h_mask: dropout mask of the down experts' input ``[N, F]``, or None.
    """

    x: Tensor
    p1: Tensor
    p3: Tensor
    gates: Tensor
    experts: Tensor
    gate: ExpertFactors | None
    up: ExpertFactors | None
    down_a: Tensor | None
    scaling: float
    x_mask: Tensor | None
    h_mask: Tensor | None

    @property
    def num_experts(self) -> int:
        """E."""
        stacks = (self.gate.lora_a if self.gate else None, self.up.lora_a if self.up else None, self.down_a)
        return next(stack.shape[0] for stack in stacks if stack is not None)

    @property
    def masked_x(self) -> Tensor:
        """What the gate and up experts read."""
        return self.x if self.x_mask is None else self.x * self.x_mask


@dataclass(frozen=True)
class FfnGradients:
    """What the backward returns, in the order of the forward's arguments; None where there is no such input."""

    dx: Tensor | None
    dp1: Tensor
    dp3: Tensor
    dgates: Tensor
    gate: tuple[Tensor, Tensor] | None
    up: tuple[Tensor, Tensor] | None
    down_a: Tensor | None


def mixlora_ffn_forward(inputs: FfnInputs) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Hidden features of the mixture, before the down projection.

    Returns:
        h ``[N, F]``; C ``[N, ER]`` (None without down experts); and for backward ``A1 x`` and ``A3 x``, ``[N, ER]``.
    """
    x, gate, up, scaling = inputs.x, inputs.gate, inputs.up, inputs.scaling
    masked_x = inputs.masked_x
    a1 = masked_x @ gate.flat_a(x.dtype).T if gate else None
    a3 = masked_x @ up.flat_a(x.dtype).T if up else None
    b1 = gate.flat_b(x.dtype) if gate else None
    b3 = up.flat_b(x.dtype) if up else None
    flat_down = inputs.down_a.to(x.dtype).flatten(0, 1) if inputs.down_a is not None else None
    hidden = torch.zeros_like(inputs.p1)
    lowered = x.new_zeros(x.shape[0], flat_down.shape[0]) if flat_down is not None else None
    for slot in range(inputs.experts.shape[1]):
        chosen = _one_hot(inputs.experts[:, slot], inputs.num_experts, x.dtype)
        weight = inputs.gates[:, slot, None].to(x.dtype)  # [N, 1]
        u1 = _expert_product(inputs.p1, a1, b1, chosen, scaling)
        u3 = _expert_product(inputs.p3, a3, b3, chosen, scaling)
        h = torch.nn.functional.silu(u1).mul_(u3)  # [N, F]
        hidden.addcmul_(h, weight)
        if lowered is not None and flat_down is not None:
            if inputs.h_mask is not None:
                h.mul_(inputs.h_mask)
            lowered += _select(h @ flat_down.T, chosen).mul_(weight)
    return hidden, lowered, a1, a3


def mixlora_ffn_backward(
    inputs: FfnInputs, dhidden: Tensor, dlowered: Tensor | None, a1: Tensor | None, a3: Tensor | None
) -> FfnGradients:
    """Gradients of the forward, with every ``[N, F]`` intermediate computed again.

    Args:
        inputs: the forward's.
        dhidden: gradient of h, ``W2^T dy``, ``[N, F]``.
        dlowered: gradient of C, ``s B2^T dy``, ``[N, ER]``; None without down experts.
        a1: from the forward; likewise a3.
    """
    gate, up, down_a, h_mask, scaling = inputs.gate, inputs.up, inputs.down_a, inputs.h_mask, inputs.scaling
    dtype = inputs.x.dtype
    b1 = gate.flat_b(dtype) if gate else None
    b3 = up.flat_b(dtype) if up else None
    flat_down = down_a.to(dtype).flatten(0, 1) if down_a is not None else None
    dp1, dp3 = torch.zeros_like(inputs.p1), torch.zeros_like(inputs.p3)
    dgates = torch.empty_like(inputs.gates)
    da1 = torch.zeros_like(a1) if a1 is not None else None
    da3 = torch.zeros_like(a3) if a3 is not None else None
    db1 = torch.zeros_like(b1) if b1 is not None else None
    db3 = torch.zeros_like(b3) if b3 is not None else None
    d_flat_down = torch.zeros_like(flat_down) if flat_down is not None else None
    for slot in range(inputs.experts.shape[1]):
        chosen = _one_hot(inputs.experts[:, slot], inputs.num_experts, dtype)
        weight = inputs.gates[:, slot, None].to(dtype)
        u1 = _expert_product(inputs.p1, a1, b1, chosen, scaling)
        u3 = _expert_product(inputs.p3, a3, b3, chosen, scaling)
        silu = torch.nn.functional.silu(u1)
        h = silu * u3
        dh = dhidden
        if dlowered is not None and flat_down is not None and d_flat_down is not None:
            z = _select(dlowered, chosen)  # [N, ER]
            from_down = z @ flat_down  # [N, F]
            masked_h = h
            if h_mask is not None:
                from_down.mul_(h_mask)
                masked_h = h * h_mask
            dh = from_down.add_(dhidden)
            d_flat_down += (z * weight).T @ masked_h
        dgates[:, slot] = _row_dot(dh, h).to(inputs.gates.dtype)
        dh = dh * weight
        du3 = dh * silu
        du1 = torch.ops.aten.silu_backward(dh.mul_(u3), u1)
        dp1 += du1
        dp3 += du3
        for du, a, da, b, db in ((du1, a1, da1, b1, db1), (du3, a3, da3, b3, db3)):
            if a is not None and da is not None and b is not None and db is not None:
                da += _select(du @ b.T, chosen).mul_(scaling)
                db += (_select(a, chosen).T @ du).mul_(scaling)
    masked_x = inputs.masked_x
    dx = None
    grads: list[tuple[Tensor, Tensor] | None] = []
    for factors, da, db in ((gate, da1, db1), (up, da3, db3)):
        if factors is None or da is None or db is None:
            grads.append(None)
            continue
        part = da @ factors.flat_a(dtype)
        dx = part if dx is None else dx.add_(part)
        d_lora_a = (da.T @ masked_x).view_as(factors.lora_a).to(factors.lora_a.dtype)
        d_lora_b = db.view(inputs.num_experts, -1, db.shape[1]).transpose(1, 2).to(factors.lora_b.dtype)
        grads.append((d_lora_a, d_lora_b))
    if dx is not None and inputs.x_mask is not None:
        dx.mul_(inputs.x_mask)
    d_down = d_flat_down.view_as(down_a).to(down_a.dtype) if down_a is not None and d_flat_down is not None else None
    return FfnGradients(dx=dx, dp1=dp1, dp3=dp3, dgates=dgates, gate=grads[0], up=grads[1], down_a=d_down)


def _one_hot(experts: Tensor, num_experts: int, dtype: torch.dtype) -> Tensor:
    """``[N, E]`` with a one at each token's expert."""
    return torch.nn.functional.one_hot(experts, num_experts).to(dtype)


def _select(values: Tensor, chosen: Tensor) -> Tensor:
    """Zero all experts' columns of ``[N, ER]`` but those of the chosen expert."""
    num_tokens, num_experts = chosen.shape
    return (values.view(num_tokens, num_experts, -1) * chosen[:, :, None]).view(num_tokens, -1)


def _expert_product(base: Tensor, a: Tensor | None, b: Tensor | None, chosen: Tensor, scaling: float) -> Tensor:
    """``base + s B_e a_e`` for each token's chosen expert, ``[N, F]``, never base itself."""
    if a is None or b is None:
        return base.clone()
    return torch.addmm(base, _select(a, chosen), b, alpha=scaling)


def _row_dot(left: Tensor, right: Tensor) -> Tensor:
    """``[N]`` inner products of rows, accumulated in at least float32."""
    wide = torch.float64 if left.dtype == torch.float64 else torch.float32
    return (left * right).sum(dim=1, dtype=wide)
