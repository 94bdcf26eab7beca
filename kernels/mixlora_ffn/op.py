"""Autograd for the mixture of LoRA experts in a SwiGLU layer."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..optional_tensors import with_gaps, without_gaps
from ..recompute import Recomputable, recomputed
from ..registration import Differentiable, Gradients, Operator, runs_kernel
from .reference import ExpertFactors, FfnInputs

_Tensors = Sequence[Tensor]

# The mixture's inputs but x, flattened as torch.library needs them. `present` says which of the gate's A and B, the up
# projection's A and B and the down projection's A there are, then which of the two dropout masks.
_FLAT = (
    "Tensor p1, Tensor p3, Tensor gates, Tensor[] factors, Tensor experts, float scaling, Tensor[] masks, "
    "bool[] present, str recipe, Tensor[] kept"
)


def _run(inputs: FfnInputs, recipe: str, sources: _Tensors) -> list[Tensor]:
    """h, C, ``A1 x`` and ``A3 x``, those of them that there are."""
    if runs_kernel(inputs.p1):
        from .kernel import mixlora_ffn_forward
    else:
        from .reference import mixlora_ffn_forward
    return [result for result in mixlora_ffn_forward(inputs) if result is not None]


def _flatten(inputs: FfnInputs, recipe: str, sources: _Tensors) -> list[Any]:
    pairs = [(pair.lora_a, pair.lora_b) if pair else (None, None) for pair in (inputs.gate, inputs.up)]
    factors, has_factor = without_gaps((*pairs[0], *pairs[1], inputs.down_a))
    masks, has_mask = without_gaps((inputs.x_mask, inputs.h_mask))
    present = [*has_factor, *has_mask]
    base = [inputs.x, inputs.p1, inputs.p3, inputs.gates]
    return [*base, factors, inputs.experts, inputs.scaling, masks, present, recipe, list(sources)]


def _forward(x: Tensor, *flat: Any) -> list[Tensor]:
    *_, recipe, kept = flat
    return _run(_inputs(x, *flat), recipe, kept)


def _forward_fake(x: Tensor, *flat: Any) -> list[Tensor]:
    inputs = _inputs(x, *flat)
    p1 = inputs.p1
    all_ranks = inputs.num_experts * inputs.rank
    # For backward the kernels keep the chosen experts' ranks alone.
    own_ranks = inputs.experts.shape[1] * inputs.rank if runs_kernel(p1) else all_ranks
    widths = [all_ranks] if inputs.down_a is not None else []
    widths += [own_ranks for pair in (inputs.gate, inputs.up) if pair is not None]
    return [torch.empty_like(p1), *(p1.new_empty(p1.shape[0], width) for width in widths)]


def _backward(dhidden: Tensor, dlowered: Tensor | None, lowered: _Tensors, *flat: Any) -> list[Tensor]:
    """dp1, dp3, dgates, the factors' gradients, and dx behind them when an expert reads x."""
    *_, recipe, kept = flat
    p1 = flat[0]
    if runs_kernel(p1):
        from .kernel import mixlora_ffn_backward
    else:
        from .reference import mixlora_ffn_backward
    inputs = _inputs(recomputed(recipe, kept) if kept else p1, *flat)  # only the gate and up experts read x
    rest = iter(lowered)
    a1, a3 = (next(rest) if pair is not None else None for pair in (inputs.gate, inputs.up))
    found = mixlora_ffn_backward(inputs, dhidden, dlowered, a1, a3)
    pairs = [*(found.gate or ()), *(found.up or ())]
    optional = [grad for grad in (found.down_a, found.dx) if grad is not None]
    return [found.dp1, found.dp3, found.dgates, *pairs, *optional]


def _backward_fake(dhidden: Tensor, dlowered: Tensor | None, lowered: _Tensors, *flat: Any) -> list[Tensor]:
    p1, p3, gates, factors, *_, kept = flat
    dx = [p1.new_empty(p1.shape[0], factors[0].shape[2])] if kept else []
    return [torch.empty_like(like) for like in (p1, p3, gates, *factors)] + dx


def _inputs(
    x: Tensor,
    p1: Tensor,
    p3: Tensor,
    gates: Tensor,
    factors: _Tensors,
    experts: Tensor,
    scaling: float,
    masks: _Tensors,
    present: Sequence[bool],
    recipe: str,
    kept: _Tensors,
) -> FfnInputs:
    gate_a, gate_b, up_a, up_b, down_a = with_gaps(factors, present[:5])
    gate = ExpertFactors(gate_a, gate_b) if gate_a is not None and gate_b is not None else None
    up = ExpertFactors(up_a, up_b) if up_a is not None and up_b is not None else None
    return FfnInputs(x, p1, p3, gates, experts, gate, up, down_a, scaling, *with_gaps(masks, present[5:]))


def _save(arguments: Sequence[Any], results: Sequence[Tensor]) -> list[Any]:
    x, *others, present, recipe, kept = arguments
    reads_x, has_down = present[0] or present[2], present[4]
    lowered = list(results[2:] if has_down else results[1:])
    return [lowered, *others, present, recipe, (kept if recipe else [x]) if reads_x else []]


def _differentiate(
    backward: Callable[..., list[Tensor]], kept: Sequence[Any], needs: Sequence[bool], grads: Gradients
) -> tuple[Any, ...]:
    lowered, *flat = kept
    p1, _, _, factors, _, _, _, present, _, sources = flat
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
    down_a = down.lora_a if down else None
    inputs = FfnInputs(x.value, p1, p3, gates, experts, gate, up, down_a, scaling, x_mask, h_mask)
    hidden, *rest = _mixlora_ffn(inputs, x.recipe, x.sources)
    if down is None:
        return hidden, None
    return hidden, rest[0] @ down.flat_b(p1.dtype).mul(scaling)
