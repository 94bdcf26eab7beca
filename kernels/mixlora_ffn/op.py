"""Autograd for the mixture of LoRA experts in a SwiGLU layer."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..compiled import runs_compiled
from ..optional_tensors import with_gaps, without_gaps
from ..recompute import Recomputable, recomputed
from ..registration import Differentiable, Gradients, Operator, runs_kernel
from . import cpu, reference
from .down import mixlora_down
from .inputs import ExpertFactors, FactorGradients, FfnGroup, FfnPart, GroupGradients, check_group

_Tensors = Sequence[Tensor]

# The mixture's inputs but x, flattened as torch.library needs them. `present` says which of the gate's A and B, the up
# projection's A and B and the down projection's A every part has, then which of its two dropout masks each has.
_FLAT = (
    "Tensor p1, Tensor p3, Tensor gates, Tensor[] factors, Tensor experts, SymInt[] lengths, float[] scalings, "
    "Tensor[] masks, bool[] present, str recipe, Tensor[] kept"
)


def _run(group: FfnGroup, recipe: str, sources: _Tensors) -> list[Tensor]:
    """h, C, ``A1 x`` and ``A3 x``, those of them that there are."""
    if runs_kernel(group.p1):
        from .kernel import mixlora_ffn_forward

        found = [_existing(mixlora_ffn_forward(inputs)) for inputs in group.one_by_one()]
        return found[0] if len(found) == 1 else [torch.cat(rows) for rows in zip(*found, strict=True)]
    if runs_compiled(group.p1):
        return _existing(cpu.group_forward(group))
    return _existing(reference.group_forward(group))


def _existing(results: Sequence[Tensor | None]) -> list[Tensor]:
    return [result for result in results if result is not None]


def _flatten(group: FfnGroup, recipe: str, sources: _Tensors) -> list[Any]:
    factors: list[Tensor] = []
    for part in group.parts:
        pairs = [(pair.lora_a, pair.lora_b) if pair else (None, None) for pair in (part.gate, part.up)]
        own, has_factor = without_gaps((*pairs[0], *pairs[1], part.down_a))
        factors += own
    masks, has_mask = without_gaps(mask for part in group.parts for mask in (part.x_mask, part.h_mask))
    scalings, present = [part.scaling for part in group.parts], [*has_factor, *has_mask]
    base = [group.x, group.p1, group.p3, group.gates, factors, group.experts]
    return [*base, group.lengths, scalings, masks, present, recipe, list(sources)]


def _forward(x: Tensor, *flat: Any) -> list[Tensor]:
    *_, recipe, kept = flat
    return _run(_group(x, *flat), recipe, kept)


def _forward_fake(x: Tensor, *flat: Any) -> list[Tensor]:
    group = _group(x, *flat)
    p1, part = group.p1, group.parts[0]
    all_ranks = group.num_experts * group.rank
    # For backward the kernels keep the chosen experts' ranks alone.
    own_ranks = group.experts.shape[1] * group.rank if runs_kernel(p1) else all_ranks
    widths = [all_ranks] if part.down_a is not None else []
    widths += [own_ranks] * len(part.reading_x)
    return [torch.empty_like(p1), *(p1.new_empty(p1.shape[0], width) for width in widths)]


def _backward(dhidden: Tensor, dlowered: Tensor | None, lowered: _Tensors, *flat: Any) -> list[Tensor]:
    """dp1, dp3, dgates, the factors' gradients, and dx behind them when an expert reads x."""
    *_, recipe, kept = flat
    p1 = flat[0]
    group = _group(recomputed(recipe, kept) if kept else p1, *flat)  # only the gate and up experts read x
    rest = iter(lowered)
    a1, a3 = (next(rest) if pair is not None else None for pair in (group.parts[0].gate, group.parts[0].up))
    if runs_kernel(p1):
        found = _backward_one_by_one(group, dhidden, dlowered, a1, a3)
    elif runs_compiled(p1):
        found = cpu.group_backward(group, dhidden, dlowered, a1, a3)
    else:
        found = reference.group_backward(group, dhidden, dlowered, a1, a3)
    factors = [grad for part in found.parts for grad in (*(part.gate or ()), *(part.up or ()), part.down_a)]
    return _existing([found.dp1, found.dp3, found.dgates, *factors, found.dx])


def _backward_one_by_one(
    group: FfnGroup, dhidden: Tensor, dlowered: Tensor | None, a1: Tensor | None, a3: Tensor | None
) -> GroupGradients:
    """By the kernels, which take one adapter."""
    from .kernel import mixlora_ffn_backward

    rows = (
        [None] * len(group.parts) if tensor is None else tensor.split(group.lengths)
        for tensor in (dhidden, dlowered, a1, a3)
    )
    found = [mixlora_ffn_backward(*own) for own in zip(group.one_by_one(), *rows, strict=True)]
    parts = [FactorGradients(own.gate, own.up, own.down_a) for own in found]
    if len(found) == 1:
        return GroupGradients(found[0].dx, found[0].dp1, found[0].dp3, found[0].dgates, parts)
    dx = [own.dx for own in found if own.dx is not None]
    dp1, dp3, dgates = (torch.cat([getattr(own, name) for own in found]) for name in ("dp1", "dp3", "dgates"))
    return GroupGradients(torch.cat(dx) if dx else None, dp1, dp3, dgates, parts)


def _backward_fake(dhidden: Tensor, dlowered: Tensor | None, lowered: _Tensors, *flat: Any) -> list[Tensor]:
    p1, p3, gates, factors, *_, kept = flat
    dx = [p1.new_empty(p1.shape[0], factors[0].shape[2])] if kept else []
    return [torch.empty_like(like) for like in (p1, p3, gates, *factors)] + dx


def _group(
    x: Tensor,
    p1: Tensor,
    p3: Tensor,
    gates: Tensor,
    factors: _Tensors,
    experts: Tensor,
    lengths: Sequence[int],
    scalings: Sequence[float],
    masks: _Tensors,
    present: Sequence[bool],
    recipe: str,
    kept: _Tensors,
) -> FfnGroup:
    parts = []
    all_masks, per_part = with_gaps(masks, present[5:]), sum(present[:5])
    for i, (length, scaling) in enumerate(zip(lengths, scalings, strict=True)):
        own = with_gaps(factors[i * per_part : (i + 1) * per_part], present[:5])
        gate_a, gate_b, up_a, up_b, down_a = own
        gate = ExpertFactors(gate_a, gate_b) if gate_a is not None and gate_b is not None else None
        up = ExpertFactors(up_a, up_b) if up_a is not None and up_b is not None else None
        parts.append(FfnPart(length, gate, up, down_a, scaling, *all_masks[2 * i : 2 * i + 2]))
    return FfnGroup(x, p1, p3, gates, experts, parts)


def _save(arguments: Sequence[Any], results: Sequence[Tensor]) -> list[Any]:
    x, *others, present, recipe, kept = arguments
    reads_x, has_down = present[0] or present[2], present[4]
    lowered = list(results[2:] if has_down else results[1:])
    return [lowered, *others, present, recipe, (kept if recipe else [x]) if reads_x else []]


def _differentiate(
    backward: Callable[..., list[Tensor]], kept: Sequence[Any], needs: Sequence[bool], grads: Gradients
) -> tuple[Any, ...]:
    lowered, *flat = kept
    p1, _, _, factors, _, _, _, _, present, _, sources = flat
    dhidden, dlowered = grads[0], grads[1] if present[4] else None
    if dhidden is None:
        dhidden = torch.zeros_like(p1)
    if dlowered is None and present[4]:
        dlowered = p1.new_zeros(p1.shape[0], factors[-1].shape[0] * factors[-1].shape[1])
    dp1, dp3, dgates, *found = backward(dhidden, dlowered, lowered, *flat)
    return found.pop() if sources else None, dp1, dp3, dgates, found


_mixlora_ffn = Differentiable(
    Operator(f"mixlora_ffn(Tensor x, {_FLAT}) -> Tensor[]", _forward, _forward_fake),
    Operator(
        f"mixlora_ffn_backward(Tensor dhidden, Tensor? dlowered, Tensor[] lowered, {_FLAT}) -> Tensor[]",
        _backward,
        _backward_fake,
    ),
    num_differentiated=5,
    save=_save,
    differentiate=_differentiate,
    run=_run,
    flatten=_flatten,
)


def mixlora_ffn(
    x: Recomputable,
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
    part = FfnPart(p1.shape[0], gate, up, down.lora_a if down else None, scaling, x_mask, h_mask)
    return mixlora_ffn_group(x, p1, p3, gates, experts, [part], [down] if down else [])


def mixlora_ffn_group(
    x: Recomputable,
    p1: Tensor,
    p3: Tensor,
    gates: Tensor,
    experts: Tensor,
    parts: Sequence[FfnPart],
    downs: Sequence[ExpertFactors],
) -> tuple[Tensor, Tensor | None]:
    """``mixlora_ffn`` of several adapters at once, which agree in E, R, K and the projections that have experts.

    No adapter's rows meet another's factors.

    Args:
        x: ``[T, D]``, the adapters' tokens one after the other, as in all that follows.
        p1: ``W1 x``, ``[T, F]``.
        p3: ``W3 x``, ``[T, F]``.
        gates: routing weights ``[T, K]``, differentiable.
        experts: LongTensor ``[T, K]``, distinct in a row, each token's among its own adapter's.
        parts: each adapter's number of tokens, factors, scaling and masks.
        downs: each adapter's factors of the down projection's experts; none without.

    Returns:
        h ``[T, F]`` and delta ``[T, D]`` (None without down experts).

    Raises:
        ValueError: for tensors that do not fit each other.
        IndexError: for an expert that there is not (on a CPU).
    """
    group = FfnGroup(x.value, p1, p3, gates, experts, parts)
    check_group(group, downs)
    hidden, *rest = _mixlora_ffn(group, x.recipe, x.sources)
    if not downs:
        return hidden, None
    lengths, scalings = [part.length for part in parts], [part.scaling for part in parts]
    return hidden, mixlora_down(rest[0], [down.lora_b for down in downs], experts, lengths, scalings)
