"""The operator that multiplies rows sorted by group with their group's matrix, and the sort that callers need."""

from typing import Any

import torch
from torch import Tensor

from . import reference


@torch.library.custom_op("moe_peft::grouped_matmul", mutates_args=())
def _grouped_matmul(x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    if x.is_cuda:
        from .kernel import grouped_matmul_forward

        return grouped_matmul_forward(x, weights, offsets)
    _check_values(offsets, x.shape[0])
    return reference.grouped_matmul_forward(x, weights, offsets)


@torch.library.custom_op("moe_peft::grouped_matmul_dx", mutates_args=())
def _grouped_matmul_dx(dy: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    if dy.is_cuda:
        from .kernel import grouped_matmul_dx

        return grouped_matmul_dx(dy, weights, offsets)
    return reference.grouped_matmul_dx(dy, weights, offsets)


@torch.library.custom_op("moe_peft::grouped_matmul_dw", mutates_args=())
def _grouped_matmul_dw(dy: Tensor, x: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    if dy.is_cuda:
        from .kernel import grouped_matmul_dw

        return grouped_matmul_dw(dy, x, offsets, dtype)
    return reference.grouped_matmul_dw(dy, x, offsets, dtype)


@_grouped_matmul.register_fake
def _(x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weights.shape[1])


@_grouped_matmul_dx.register_fake
def _(dy: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    return dy.new_empty(dy.shape[0], weights.shape[2])


@_grouped_matmul_dw.register_fake
def _(dy: Tensor, x: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    return dy.new_empty(offsets.shape[0] - 1, dy.shape[1], x.shape[1], dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weights, offsets = ctx.saved_tensors
    dx = _grouped_matmul_dx(dy, weights, offsets) if ctx.needs_input_grad[0] else None
    dw = _grouped_matmul_dw(dy, x, offsets, weights.dtype) if ctx.needs_input_grad[1] else None
    return dx, dw, None


_grouped_matmul.register_autograd(_backward, setup_context=_setup_context)


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
