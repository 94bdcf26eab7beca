"""Autograd for the frozen projections of one input plus per-range LoRA."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..compiled import runs_compiled
from ..frozen_linear.op import frozen_linears
from ..optional_tensors import with_gaps, without_gaps
from ..recompute import Recomputable, recomputed
from ..registration import Differentiable, Gradients, Operator, runs_kernel
from .ranges import LoraRange

_Tensors = Sequence[Tensor]

# The projections and ranges, flattened as torch.library needs them. `present` says which projections have a bias, then
# which ranges a mask, then which projections of each range have factors.
_FLAT = "Tensor[] factors, Tensor[] weights, SymInt[] bounds, float[] scalings, Tensor[] masks, bool[] present"


def _run(
    x: Recomputable, weights: _Tensors, biases: Sequence[Tensor | None], ranges: Sequence[LoraRange]
) -> list[Tensor]:
    """The outputs, and each range's lowered rows behind them."""
    if runs_kernel(x.value):
        from .kernel import lora_linear_forward
    elif runs_compiled(x.value):
        from .cpu import lora_linear_forward
    else:
        from .reference import lora_linear_forward
    outputs, lowered = lora_linear_forward(x.value, weights, biases, ranges)
    return outputs + lowered


def _flatten(
    x: Recomputable, weights: _Tensors, biases: Sequence[Tensor | None], ranges: Sequence[LoraRange]
) -> list[Any]:
    some_biases, has_bias = without_gaps(biases)
    masks, has_mask = without_gaps(part.mask for part in ranges)
    pairs = [pair for part in ranges for pair in part.factors]
    return [
        x.value,
        [factor for pair in pairs if pair is not None for factor in pair],
        list(weights),
        [edge for part in ranges for edge in (part.start, part.end)],
        [scaling for part in ranges for scaling in part.scalings],
        masks,
        [*has_bias, *has_mask, *(pair is not None for pair in pairs)],
        some_biases,
        x.recipe,
        list(x.sources),
    ]


def _forward(x: Tensor, *arguments: Any) -> list[Tensor]:
    *flat, some_biases, recipe, kept = arguments
    _, weights, *_, present = flat
    biases = with_gaps(some_biases, present[: len(weights)])
    return _run(Recomputable(x, recipe, kept), weights, biases, _ranges(*flat))


def _forward_fake(x: Tensor, *arguments: Any) -> list[Tensor]:
    *flat, _, _, _ = arguments
    outputs = [x.new_empty(x.shape[0], weight.shape[0]) for weight in flat[1]]
    return [*outputs, *(x.new_empty(part.end - part.start, sum(part.ranks)) for part in _ranges(*flat))]


def _backward(d_outputs: _Tensors, lowered: _Tensors, needs_dx: bool, *arguments: Any) -> list[Tensor]:
    """The factors' gradients in the factors' order, and dx behind them when it is needed."""
    *flat, recipe, kept = arguments
    x = recomputed(recipe, kept)
    if runs_kernel(x):
        from .kernel import lora_linear_backward
    elif runs_compiled(x):
        from .cpu import lora_linear_backward
    else:
        from .reference import lora_linear_backward
    dx, gradients = lora_linear_backward(d_outputs, x, flat[1], _ranges(*flat), lowered, needs_dx)
    found = [grad for of_range in gradients for pair in of_range if pair is not None for grad in pair]
    return [*found, dx] if dx is not None else found


def _backward_fake(d_outputs: _Tensors, lowered: _Tensors, needs_dx: bool, *arguments: Any) -> list[Tensor]:
    factors, weights, *_ = arguments
    found = [torch.empty_like(factor) for factor in factors]
    dx_shape = d_outputs[0].shape[0], weights[0].shape[1]
    return [*found, d_outputs[0].new_empty(dx_shape)] if needs_dx else found


def _ranges(
    factors: _Tensors,
    weights: _Tensors,
    bounds: Sequence[int],
    scalings: Sequence[float],
    masks: _Tensors,
    present: Sequence[bool],
) -> list[LoraRange]:
    num_projections, num_ranges = len(weights), len(bounds) // 2
    all_masks = with_gaps(masks, present[num_projections : num_projections + num_ranges])
    has_factors, rest = iter(present[num_projections + num_ranges :]), iter(factors)
    ranges = []
    for i, mask in enumerate(all_masks):
        pairs = tuple((next(rest), next(rest)) if next(has_factors) else None for _ in range(num_projections))
        own_scalings = tuple(scalings[i * num_projections : (i + 1) * num_projections])
        ranges.append(LoraRange(bounds[2 * i], bounds[2 * i + 1], pairs, own_scalings, mask))
    return ranges


def _save(arguments: Sequence[Any], results: Sequence[Tensor]) -> list[Any]:
    x, *flat, _, recipe, kept = arguments
    return [list(results[len(flat[1]) :]), *flat, recipe, kept if recipe else [x]]


def _differentiate(
    backward: Callable[..., list[Tensor]], kept: Sequence[Any], needs: Sequence[bool], grads: Gradients
) -> tuple[Tensor | None, list[Tensor]]:
    lowered, *flat = kept
    factors, weights, *_ = flat
    some = next(grad for grad in grads if grad is not None)
    d_outputs = [
        some.new_zeros(some.shape[0], weight.shape[0]) if grad is None else grad
        for grad, weight in zip(grads, weights, strict=False)
    ]
    found = backward(d_outputs, lowered, needs[0], *flat)
    return found[-1] if needs[0] else None, found[: len(factors)]


_lora_linear = Differentiable(
    Operator(
        f"lora_linear(Tensor x, {_FLAT}, Tensor[] biases, str recipe, Tensor[] kept) -> Tensor[]",
        _forward,
        _forward_fake,
    ),
    Operator(
        "lora_linear_backward(Tensor[] d_outputs, Tensor[] lowered, bool needs_dx, "
        f"{_FLAT}, str recipe, Tensor[] kept) -> Tensor[]",
        _backward,
        _backward_fake,
    ),
    num_differentiated=2,
    save=_save,
    differentiate=_differentiate,
    run=_run,
    flatten=_flatten,
)


def lora_linear(
    x: Recomputable, weights: Sequence[Tensor], biases: Sequence[Tensor | None], ranges: Sequence[LoraRange]
) -> list[Tensor]:
    """Frozen projections of one input, with a LoRA of their own on each token range.

    A base product runs once over all tokens; a range only ever touches its own rows. The low-rank products of all
    projections read x together.

    Args:
        x: ``[T, I]``.
        weights: frozen ``[O_j, I]`` of each projection; no gradient is computed for them.
        biases: frozen ``[O_j]`` or None, of each projection.
        ranges: disjoint token ranges with their factors. Factors may be of a wider dtype than x: the
            gradients come back in the factors'.

    Returns:
        ``[T, O_j]`` of each projection, in x's dtype.
    """
    if not ranges:
        return frozen_linears(x.value, weights, biases)
    results: Sequence[Tensor] = _lora_linear(x, weights, biases, ranges)
    return list(results[: len(weights)])
