"""The mixture of LoRA experts in a SwiGLU layer, by the combined algebra, in plain PyTorch.

For a token x with selected experts e(1..K), weights g_k and the frozen products p1 = W1 x, p3 = W3 x (computed once)::

    u1_k = p1 + s B1_e A1_e x      u3_k = p3 + s B3_e A3_e x      h_k = silu(u1_k) * u3_k
    h    = sum_k g_k h_k           C_e  = g_k A2_e h_k

so that the layer's output is ``W2 h + s sum_e B2_e C_e``: W2, too, runs once a token. What an expert's rows of B or A2
add to a token is a weighted sum of R table rows: ``embedding_bag`` reads those alone and writes once, however many
experts there are. Products over F are one dense GEMM over all of an adapter's experts, of which each token's own
columns are taken. Nothing per expert of width F is kept for backward.

Several adapters run together: their factors stand in one table, where a token reads its own adapter's rows alone, and
what treats tokens one by one runs once over all. The products are each adapter's own (see ``parts``).

Letters: T tokens of all adapters, N tokens of one, P adapters, D model, F ffn, E experts, K top-k, R rank, ER all of an
adapter's experts' ranks side by side, S projections among gate and up that have experts.
"""

import math

import torch
from torch import Tensor

from ..parts import columns_by_part, times, transposed_times
from .inputs import ExpertFactors, FactorGradients, FfnGradients, FfnGroup, FfnInputs, GroupGradients
from .model_products import input_gradients, joined, lowered_inputs


def mixlora_ffn_forward(inputs: FfnInputs) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Hidden features of one adapter's mixture, before the down projection.

    Returns:
        h ``[N, F]``; C ``[N, ER]`` (None without down experts); and for backward ``A1 x`` and ``A3 x``, ``[N, ER]``.
    """
    return group_forward(FfnGroup.of_one(inputs))


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
    found = group_backward(FfnGroup.of_one(inputs), dhidden, dlowered, a1, a3)
    (part,) = found.parts
    return FfnGradients(found.dx, found.dp1, found.dp3, found.dgates, part.gate, part.up, part.down_a)


def group_forward(group: FfnGroup) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """``mixlora_ffn_forward`` of several adapters, whose rows stand below each other."""
    a1, a3 = lowered_inputs(group)
    mixture = _Mixture(group, a1, a3)
    down_a, h_mask = _flat_down_a(group), group.h_mask
    hidden = None
    lowered = mixture.nothing(1) if down_a is not None else None
    for slot in range(group.experts.shape[1]):
        ranks, weight = mixture.ranks[slot], mixture.weights[slot]
        u1, u3 = mixture.preactivations(slot)
        h = torch.nn.functional.silu(u1, inplace=True).mul_(u3)  # [T, F]
        if lowered is not None and down_a is not None:
            products = times(h if h_mask is None else h * h_mask, down_a.transpose(1, 2), group.lengths)
            lowered.scatter_(1, ranks, products.gather(1, ranks).mul_(weight))
        hidden = h.mul_(weight) if hidden is None else hidden.addcmul_(h, weight)
    assert hidden is not None
    return hidden, lowered, a1, a3


def group_backward(
    group: FfnGroup, dhidden: Tensor, dlowered: Tensor | None, a1: Tensor | None, a3: Tensor | None
) -> GroupGradients:
    """``mixlora_ffn_backward`` of several adapters, whose rows stand below each other."""
    mixture = _Mixture(group, a1, a3)
    sums = _Sums()
    dgates = torch.empty_like(group.gates)
    h_mask = group.h_mask
    down_a = _flat_down_a(group) if dlowered is not None else None
    from_down = None
    if down_a is not None:
        from_down = _Table(down_a, dhidden if h_mask is None else torch.zeros_like(dhidden))
    da = mixture.nothing(len(group.parts[0].reading_x))  # [T, S*ER]
    da_columns = iter(da.chunk(len(group.parts[0].reading_x), dim=1) if da.shape[1] else ())
    reading = [
        (name, a, next(da_columns), table.factors.transpose(1, 2))
        for name, a, table in (("1", a1, mixture.table1), ("3", a3, mixture.table3))
        if a is not None and table is not None
    ]
    for slot in range(group.experts.shape[1]):
        ranks, weight = mixture.ranks[slot], mixture.weights[slot]
        u1, u3 = mixture.preactivations(slot)
        silu = torch.nn.functional.silu(u1)
        h = silu * u3
        dh = dhidden
        if dlowered is not None and from_down is not None:
            z = dlowered.gather(1, ranks)  # [T, R]
            dh = from_down.weighted_rows(mixture.rows[slot], z)
            masked_h = h
            if h_mask is not None:
                dh.mul_(h_mask).add_(dhidden)
                masked_h = h * h_mask
            sums.add("down_a", transposed_times(mixture.columns(z * weight, slot), masked_h, group.lengths))
        dgates[:, slot] = _row_dot(dh, h)
        dh = dh * weight if dh is dhidden else dh.mul_(weight)
        du3 = silu.mul_(dh)
        du1 = torch.ops.aten.silu_backward(dh.mul_(u3), u1)
        for name, a, own_da, factors in reading:
            du = du1 if name == "1" else du3
            own_da.scatter_(1, ranks, times(du, factors, group.lengths).gather(1, ranks))
            sums.add(f"db{name}", transposed_times(mixture.columns(a.gather(1, ranks), slot), du, group.lengths))
        sums.add("dp1", du1)
        sums.add("dp3", du3)
    dx, d_flat_a = input_gradients(group, da)
    db1, db3 = (_by_expert(group, sums.get(name), turned=True) for name in ("db1", "db3"))
    d_down_a = _by_expert(group, sums.get("down_a"), turned=False)
    parts = factor_gradients(group, d_flat_a, db1, db3, d_down_a)
    return GroupGradients(dx, sums["dp1"], sums["dp3"], dgates, parts)


def factor_gradients(
    group: FfnGroup, d_flat_a: Tensor | None, db1: Tensor | None, db3: Tensor | None, d_down_a: Tensor | None
) -> list[FactorGradients]:
    """Each part's own, in its factors' dtype, contiguous and each in memory of its own.

    Args:
        group: what they are the gradients of.
        d_flat_a: of the A that read x, ``[P, S*ER, D]``.
        db1: of the gate's B, still without the scaling, ``[P, E, F, R]``; likewise db3.
        d_down_a: ``[P, E, R, F]``.
    """
    found = []
    for i, part in enumerate(group.parts):
        d_as = iter(d_flat_a[i].chunk(len(part.reading_x)) if d_flat_a is not None else ())
        pairs: list[tuple[Tensor, Tensor] | None] = []
        for db, stack in ((db1, part.gate), (db3, part.up)):
            if stack is None or db is None:
                pairs.append(None)
                continue
            d_lora_a = _owned(next(d_as).view_as(stack.lora_a), stack.lora_a)
            pairs.append((d_lora_a, _owned(db[i], stack.lora_b).mul_(part.scaling)))
        d_down = _owned(d_down_a[i], part.down_a) if part.down_a is not None and d_down_a is not None else None
        found.append(FactorGradients(pairs[0], pairs[1], d_down))
    return found


def _owned(gradient: Tensor, like: Tensor) -> Tensor:
    """The gradient in its factor's dtype and in memory that is all its own, as that of a single part may be already."""
    own_bytes = gradient.numel() * gradient.element_size()
    if gradient.dtype == like.dtype and gradient.is_contiguous() and gradient.untyped_storage().nbytes() == own_bytes:
        return gradient
    return torch.empty_like(like, memory_format=torch.contiguous_format).copy_(gradient)


def _by_expert(group: FfnGroup, flat: Tensor | None, turned: bool) -> Tensor | None:
    """``[P, ER, F]`` as ``[P, E, R, F]``, or turned to ``[P, E, F, R]``."""
    if flat is None:
        return None
    found = flat.unflatten(1, (group.num_experts, group.rank))
    return found.transpose(2, 3) if turned else found


class _Mixture:
    """The routing of every slot, and the factors of gate and up side by side in x's dtype.

    Attributes:
        ranks: LongTensor ``[T, R]`` a slot: where its expert's ranks stand among all ER of its adapter.
        rows: LongTensor ``[T, R + 1]`` a slot: where they stand in a table, and the token's own row.
        weights: ``[T, 1]`` a slot.
        table1: of ``s B1^T`` and p1; None without experts on the gate. Likewise table3.
    """

    def __init__(self, group: FfnGroup, a1: Tensor | None, a3: Tensor | None) -> None:
        device, width = group.experts.device, group.num_experts * group.rank
        self._group, self._width = group, width
        within = torch.arange(group.rank, device=device)
        self.ranks = [experts[:, None] * group.rank + within for experts in group.experts.unbind(1)]
        self.weights = [gates[:, None].to(group.p1.dtype) for gates in group.gates.unbind(1)]
        own = torch.arange(len(group.parts) * width, len(group.parts) * width + group.p1.shape[0], device=device)
        offset = _offsets(group.lengths, width, device)
        self.rows = [
            torch.cat([ranks if offset is None else ranks + offset, own[:, None]], dim=1) for ranks in self.ranks
        ]
        bases = (a1, [part.gate for part in group.parts], group.p1), (a3, [part.up for part in group.parts], group.p3)
        self.table1, self.table3 = (
            _Table(_flat_b(group, stacks), base) if a is not None else None for a, stacks, base in bases
        )
        self._bases = (a1, self.table1, group.p1), (a3, self.table3, group.p3)

    def preactivations(self, slot: int) -> tuple[Tensor, Tensor]:
        """``u1`` and ``u3`` of each token's expert, ``[T, F]``, never the base products themselves."""
        ranks, rows = self.ranks[slot], self.rows[slot]
        u1, u3 = (
            base.clone() if a is None or table is None else table.weighted_rows(rows, a.gather(1, ranks))
            for a, table, base in self._bases
        )
        return u1, u3

    def nothing(self, stacks: int) -> Tensor:
        """Zeros for all ranks of some stacks, ``[T, stacks * ER]``."""
        return self._group.p1.new_zeros(self._group.p1.shape[0], stacks * self._width)

    def columns(self, values: Tensor, slot: int) -> Tensor:
        """Each token's ``[T, R]`` at its expert's ranks among all, zeros elsewhere, for ``transposed_times``."""
        return columns_by_part(values, self.ranks[slot], self._width, self._group.lengths)


class _Table:
    """Rows of the factors that tokens take in sums, each behind a row of its own.

    The own rows stand in the table too, so that one pass writes the whole sum.

    Args:
        factors: ``[P, ER, F]``.
        own: ``[T, F]``.
    """

    def __init__(self, factors: Tensor, own: Tensor) -> None:
        self.factors = factors
        self._rows = torch.cat([factors.flatten(0, 1), own])

    def weighted_rows(self, rows: Tensor, weights: Tensor) -> Tensor:
        """``own + sum_j weights_j factor[rows_j]`` of every token, accumulated wide, ``[T, F]``.

        Args:
            rows: LongTensor ``[T, R + 1]``, the last the token's own.
            weights: ``[T, R]`` in the table's dtype.
        """
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


def _offsets(lengths: list[int], width: int, device: torch.device) -> Tensor | None:
    """Where each token's adapter begins in a table, LongTensor ``[T, 1]``; None: all in the first."""
    if len(lengths) == 1:
        return None
    return torch.cat([torch.full((n, 1), i * width, device=device) for i, n in enumerate(lengths)])


def _flat_down_a(group: FfnGroup) -> Tensor | None:
    """A of all down experts, ``[P, ER, F]``."""
    stacks = [part.down_a for part in group.parts if part.down_a is not None]
    return joined(stacks, group.p1.dtype).view(len(group.parts), -1, group.p1.shape[1]) if stacks else None


def _flat_b(group: FfnGroup, stacks: list[ExpertFactors | None]) -> Tensor:
    """``s B^T`` of all experts of one projection, ``[P, ER, F]``."""
    shape = len(stacks), group.num_experts, group.rank, group.p1.shape[1]
    flat = group.p1.new_empty(shape)
    for own, part, stack in zip(flat.unbind(0), group.parts, stacks, strict=True):
        assert stack is not None
        torch.mul(stack.lora_b.transpose(1, 2), part.scaling, out=own)
    return flat.flatten(1, 2)


def _row_dot(left: Tensor, right: Tensor) -> Tensor:
    """``[N]`` inner products of rows.

    A sum in its own dtype accumulates in float32, and takes a quarter of the time that a sum into float32 takes; parts
    of a row, added up in float32, keep its rounding small.
    """
    products = left * right
    wide = torch.float64 if left.dtype == torch.float64 else torch.float32
    return products.unflatten(1, (math.gcd(products.shape[1], 4), -1)).sum(dim=2).sum(dim=1, dtype=wide)
