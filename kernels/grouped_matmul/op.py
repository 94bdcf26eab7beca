"""The operator that multiplies rows sorted by group with their group's matrix, and the sort that callers need."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..registration import Differentiable, Gradients, Operator, runs_kernel
from . import reference


def _forward(x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    if runs_kernel(x):
        from .kernel import grouped_matmul_forward

        return grouped_matmul_forward(x, weights, offsets)
    _check_values(offsets, x.shape[0])
    return reference.grouped_matmul_forward(x, weights, offsets)


def _backward(dy: Tensor, x: Tensor, weights: Tensor, offsets: Tensor, needs_dx: bool, needs_dw: bool) -> list[Tensor]:
    """Of dx and dw, those that are needed."""
    if runs_kernel(dy):
        from .kernel import grouped_matmul_dw, grouped_matmul_dx
    else:
        from .reference import grouped_matmul_dw, grouped_matmul_dx
    found = [grouped_matmul_dx(dy, weights, offsets)] if needs_dx else []
    return [*found, grouped_matmul_dw(dy, x, offsets, weights.dtype)] if needs_dw else found


def _differentiate(
    backward: Callable[..., list[Tensor]], kept: Sequence[Any], needs: Sequence[bool], grads: Gradients
) -> list[Tensor | None]:
    found = iter(backward(grads[0], *kept, *needs))
    return [next(found) if need else None for need in needs]


_grouped_matmul = Differentiable(
    Operator(
        "grouped_matmul(Tensor x, Tensor weights, Tensor offsets) -> Tensor",
        _forward,
        fake=lambda x, weights, offsets: x.new_empty(x.shape[0], weights.shape[1]),
    ),
    Operator(
        "grouped_matmul_backward(Tensor dy, Tensor x, Tensor weights, Tensor offsets, bool needs_dx, bool needs_dw) "
        "-> Tensor[]",
        _backward,
        fake=lambda dy, x, weights, offsets, *needs: [
            like.new_empty(like.shape) for like, need in zip((x, weights), needs, strict=True) if need
        ],
    ),
    num_differentiated=2,
    save=lambda arguments, results: arguments,
    differentiate=_differentiate,
)


def _check_values(offsets: Tensor, num_rows: int) -> None:
    ends = offsets.tolist()
    if ends[0] != 0 or ends[-1] != num_rows or ends != sorted(ends):
        raise ValueError(f"offsets={ends} must ascend from 0 to the number of rows, {num_rows}")


def sort_by_group(ids: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """The order that brings rows of one group together, without waiting for the device.

    Args:
        ids: every row's group in ``0..num_groups-1``, integers of any shape; ``[N, K]`` are K rows for each of N
            tokens, token ``i // K`` being row i's.
        num_groups: G.

    Returns:
        order: LongTensor ``[ids.numel()]``, places in the flattened ids; rows of one group keep their order.
        offsets: int32 ``[G + 1]``; in the new order group g is ``offsets[g]:offsets[g + 1]``.
    """
    ordered, order = ids.flatten().sort(stable=True)
    groups = torch.arange(num_groups + 1, dtype=ordered.dtype, device=ids.device)
    return order, torch.searchsorted(ordered, groups, out_int32=True)


def grouped_matmul(x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """Each row times its group's own matrix, ``y_n = W_g x_n``.

    Differentiable in x and weights. A group's matrix only ever meets its own rows.

    Args:
        x: ``[N, I]``, rows sorted by group (see ``sort_by_group``).
        weights: ``[G, O, I]``. They may be of a wider dtype than x: the products run in x's dtype, the gradient comes
            back in the weights'.
        offsets: int32 ``[G + 1]`` on x's device, ascending from 0 to N: group g is the rows
            ``offsets[g]:offsets[g + 1]``. On a GPU their values are trusted, since looking at them would wait for it.

    Returns:
        ``[N, O]`` in x's dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not belong together; on the CPU also wrong offsets.
    """
    if x.ndim != 2 or weights.ndim != 3 or x.shape[1] != weights.shape[2] or 0 in weights.shape:
        raise ValueError(
            f"x {tuple(x.shape)} and weights {tuple(weights.shape)} must be [N, I] and [G, O, I], G, O and I at least 1"
        )
    if offsets.shape != (weights.shape[0] + 1,):
        raise ValueError(f"offsets {tuple(offsets.shape)} must be [G + 1] for weights {tuple(weights.shape)}")
    if offsets.dtype != torch.int32:
        raise ValueError(f"offsets' dtype {offsets.dtype} must be torch.int32")
    if not x.is_floating_point() or not weights.is_floating_point():
        raise ValueError(f"x's and weights' dtypes {x.dtype} and {weights.dtype} must be floating point")
    if not x.device == weights.device == offsets.device:
        raise ValueError(
            f"x, weights and offsets on {x.device}, {weights.device} and {offsets.device} must share a device"
        )
    result: Tensor = _grouped_matmul(x, weights, offsets)
    return result
