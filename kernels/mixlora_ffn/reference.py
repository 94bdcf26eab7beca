"""The mixture of LoRA experts in a SwiGLU layer, by the combined algebra, in plain PyTorch.

For a token x with selected experts e(1..K), weights g_k and the frozen products p1 = W1 x, p3 = W3 x (computed once)::

    u1_k = p1 + s B1_e A1_e x      u3_k = p3 + s B3_e A3_e x      h_k = silu(u1_k) * u3_k
    h    = sum_k g_k h_k           C_e  = g_k A2_e h_k

so that the layer's output is ``W2 h + s sum_e B2_e C_e``: W2, too, runs once a token. What an expert's rows of B or A2
add to a token is a weighted sum of R table rows: ``embedding_bag`` reads those alone and writes once, however many
experts there are. Products over F are one dense GEMM over all experts, of which each token's own columns are taken.
Nothing per expert of width F is kept for backward.

Letters: N tokens of one adapter, D model, F ffn, E experts, K top-k, R rank, ER all experts' ranks side by side.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..products import matmul, matmul_t


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

    def flat_b(self, dtype: torch.dtype, scaling: float = 1.0) -> Tensor:
        """All transposed B side by side, times a factor, ``[ER, out]``."""
        return self.lora_b.mul(scaling).to(dtype).transpose(1, 2).flatten(0, 1)


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
        return self._one_stack.shape[0]

    @property
    def rank(self) -> int:
        """R."""
        return self._one_stack.shape[1]

    @property
    def _one_stack(self) -> Tensor:
        stacks = (self.gate.lora_a if self.gate else None, self.up.lora_a if self.up else None, self.down_a)
        return next(stack for stack in stacks if stack is not None)

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
    gate, up = inputs.gate, inputs.up
    dtype = inputs.p1.dtype
    stacks = [stack for stack in (gate, up) if stack is not None]
    lowered_x = iter(
        (matmul_t(inputs.masked_x, _side_by_side(stacks, dtype))).chunk(len(stacks), dim=1) if stacks else ()
    )
    a1 = next(lowered_x).clone(memory_format=torch.contiguous_format) if gate else None
    a3 = next(lowered_x).clone(memory_format=torch.contiguous_format) if up else None
    mixture = _Mixture(inputs, a1, a3)
    hidden = None
    lowered = mixture.nothing_lowered()
    for slot in range(inputs.experts.shape[1]):
        ranks, weight = mixture.ranks[slot], mixture.weights[slot]
        u1, u3 = mixture.preactivations(ranks)
        h = torch.nn.functional.silu(u1, inplace=True).mul_(u3)  # [N, F]
        if lowered is not None and mixture.down_a is not None:
            masked_h = h if inputs.h_mask is None else h * inputs.h_mask
            lowered.scatter_(1, ranks, matmul_t(masked_h, mixture.down_a).gather(1, ranks).mul_(weight))
        hidden = h.mul_(weight) if hidden is None else hidden.addcmul_(h, weight)
    assert hidden is not None
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
    mixture = _Mixture(inputs, a1, a3)
    sums = _Sums()
    dgates = torch.empty_like(inputs.gates)
    da1, da3 = (torch.zeros_like(a) if a is not None else None for a in (a1, a3))
    from_down = None
    if dlowered is not None and mixture.down_a is not None:
        from_down = _Table(mixture.down_a, dhidden if inputs.h_mask is None else torch.zeros_like(dhidden))
    for slot in range(inputs.experts.shape[1]):
        ranks, weight = mixture.ranks[slot], mixture.weights[slot]
        u1, u3 = mixture.preactivations(ranks)
        silu = torch.nn.functional.silu(u1)
        h = silu * u3
        dh = dhidden
        if dlowered is not None and from_down is not None:
            z = dlowered.gather(1, ranks)  # [N, R]
            dh = from_down.weighted_rows(ranks, z)
            masked_h = h
            if inputs.h_mask is not None:
                dh.mul_(inputs.h_mask).add_(dhidden)
                masked_h = h * inputs.h_mask
            sums.add("down_a", matmul(mixture.columns(z * weight, ranks), masked_h))
        dgates[:, slot] = _row_dot(dh, h)
        dh = dh * weight if dh is dhidden else dh.mul_(weight)
        du3 = silu.mul_(dh)
        du1 = torch.ops.aten.silu_backward(dh.mul_(u3), u1)
        for name, du, a, da, b in (("1", du1, a1, da1, mixture.b1), ("3", du3, a3, da3, mixture.b3)):
            if a is not None and da is not None and b is not None:
                da.scatter_(1, ranks, matmul_t(du, b).gather(1, ranks))
                sums.add(f"db{name}", matmul(mixture.columns(a.gather(1, ranks), ranks), du))
        sums.add("dp1", du1)
        sums.add("dp3", du3)
    dx, gate_grads, up_grads = _input_gradients(inputs, da1, da3, sums)
    down_a, d_down = inputs.down_a, sums.get("down_a")
    return FfnGradients(
        dx=dx,
        dp1=sums["dp1"],
        dp3=sums["dp3"],
        dgates=dgates,
        gate=gate_grads,
        up=up_grads,
        down_a=d_down.view_as(down_a).to(down_a.dtype) if down_a is not None and d_down is not None else None,
    )


class _Mixture:
    """The routing of every slot, and the factors side by side in x's dtype.

    Attributes:
        ranks: LongTensor ``[N, R]`` a slot: where its expert's ranks stand among all ER.
        weights: ``[N, 1]`` a slot.
        b1: ``s B1^T`` of all experts, ``[ER, F]``; likewise b3.
        down_a: A2 of all experts, ``[ER, F]``.
    """

    def __init__(self, inputs: FfnInputs, a1: Tensor | None, a3: Tensor | None) -> None:
        dtype = inputs.p1.dtype
        self._inputs, self._a1, self._a3 = inputs, a1, a3
        within = torch.arange(inputs.rank, device=inputs.experts.device)
        self.ranks = [experts[:, None] * inputs.rank + within for experts in inputs.experts.unbind(1)]
        self.weights = [gates[:, None].to(dtype) for gates in inputs.gates.unbind(1)]
        self.b1 = inputs.gate.flat_b(dtype, inputs.scaling) if inputs.gate else None
        self.b3 = inputs.up.flat_b(dtype, inputs.scaling) if inputs.up else None
        self._table1 = _Table(self.b1, inputs.p1) if self.b1 is not None else None
        self._table3 = _Table(self.b3, inputs.p3) if self.b3 is not None else None
        self.down_a = inputs.down_a.to(dtype).flatten(0, 1) if inputs.down_a is not None else None

    def preactivations(self, ranks: Tensor) -> tuple[Tensor, Tensor]:
        """``u1`` and ``u3`` of each token's expert, ``[N, F]``, never the base products themselves."""
        bases = ((self._inputs.p1, self._a1, self._table1), (self._inputs.p3, self._a3, self._table3))
        u1, u3 = (
            base.clone() if a is None or table is None else table.weighted_rows(ranks, a.gather(1, ranks))
            for base, a, table in bases
        )
        return u1, u3

    def nothing_lowered(self) -> Tensor | None:
        """Zeros for C, ``[N, ER]``; None without down experts."""
        p1 = self._inputs.p1
        return p1.new_zeros(p1.shape[0], self.down_a.shape[0]) if self.down_a is not None else None

    def columns(self, values: Tensor, ranks: Tensor) -> Tensor:
        """Each token's ``[N, R]`` at its expert's ranks among all, zeros elsewhere, as ``[ER, N]``.

        Laid out so because oneDNN multiplies a narrow operand faster when it need not transpose it.
        """
        wide = values.new_zeros(self._inputs.num_experts * self._inputs.rank, values.shape[0])
        return wide.scatter_(0, ranks.T, values.T)


class _Table:
    """Rows of a factor that tokens take in sums, each behind a row of its own.

    The own rows stand in the table too, so that one pass writes the whole sum.

    Args:
        factor: ``[ER, F]``.
        own: ``[N, F]``.
    """

    def __init__(self, factor: Tensor, own: Tensor) -> None:
        self._rows = torch.cat([factor, own])
        self._own = torch.arange(factor.shape[0], self._rows.shape[0], device=own.device)[:, None]  # [N, 1]

    def weighted_rows(self, ranks: Tensor, weights: Tensor) -> Tensor:
        """``own + sum_j weights_j factor[ranks_j]`` of every token, accumulated wide, ``[N, F]``.

        Args:
            ranks: LongTensor ``[N, R]``.
            weights: ``[N, R]`` in the table's dtype.
        """
        rows = torch.cat([ranks, self._own], dim=1)
        all_weights = torch.cat([weights, weights.new_ones(()).expand(weights.shape[0], 1)], dim=1)
        return torch.nn.functional.embedding_bag(rows, self._rows, per_sample_weights=all_weights, mode="sum")


class _Sums(dict[str, Tensor]):
    """Sums over the slots, each starting as its first term."""

    def add(self, name: str, term: Tensor) -> None:
        """The term may be taken over, to be changed in place."""
        if name in self:
            self[name].add_(term)
        else:
            self[name] = term


def _input_gradients(
    inputs: FfnInputs, da1: Tensor | None, da3: Tensor | None, sums: _Sums
) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None, tuple[Tensor, Tensor] | None]:
    """The gradients of x and of the stacks that read it, the gate's and the up projection's."""
    found = {"db1": (inputs.gate, da1), "db3": (inputs.up, da3)}
    reading = [(name, stack, da) for name, (stack, da) in found.items() if stack is not None and da is not None]
    if not reading:
        return None, None, None
    da = reading[0][2] if len(reading) == 1 else torch.cat([da for _, _, da in reading], dim=1)
    dx = matmul(da, _side_by_side([stack for _, stack, _ in reading], da.dtype))
    if inputs.x_mask is not None:
        dx.mul_(inputs.x_mask)
    d_flat_a = matmul(da.T.contiguous(), inputs.masked_x).chunk(len(reading))
    grads: dict[str, tuple[Tensor, Tensor]] = {}
    for (name, stack, _), d_a in zip(reading, d_flat_a, strict=True):
        d_lora_b = torch.empty_like(stack.lora_b, memory_format=torch.contiguous_format)
        d_lora_b.copy_(sums[name].view(inputs.num_experts, -1, sums[name].shape[1]).transpose(1, 2))
        d_lora_a = torch.empty_like(stack.lora_a, memory_format=torch.contiguous_format)
        grads[name] = d_lora_a.copy_(d_a.view_as(stack.lora_a)), d_lora_b.mul_(inputs.scaling)
    return dx, grads.get("db1"), grads.get("db3")


def _side_by_side(stacks: list[ExpertFactors], dtype: torch.dtype) -> Tensor:
    """All A of several stacks, ``[stacks * ER, in]``."""
    return torch.cat([stack.flat_a(dtype) for stack in stacks])


def _row_dot(left: Tensor, right: Tensor) -> Tensor:
    """``[N]`` inner products of rows.

    A sum in its own dtype accumulates in float32, and takes a quarter of the time that a sum into float32 takes; parts
    of a row, added up in float32, keep its rounding small.
    """
    products = left * right
    wide = torch.float64 if left.dtype == torch.float64 else torch.float32
    return products.unflatten(1, (math.gcd(products.shape[1], 4), -1)).sum(dim=2).sum(dim=1, dtype=wide)
