"""Triton launchers of the frozen projections plus per-range LoRA: each stage is one launch over all adapters.

The frozen products stay with cuBLAS. Around them, all ranges with their own factors, ranks and rows at once::

    a = (m * x) A^T, all projections side by side            da_j = s dy_j B_j
    y_j += s a_j B_j^T                                       dx += m * (da A)
                                                             dB_j = s dy_j^T a_j      dA = da^T (m * x)

Augmenting the frozen GEMM instead, ``[x | a] [W_j | s B_j]^T``, would win for one adapter over all tokens whose
projections are together much wider than x (gate and up), because it saves a read and a write of every y_j. It costs a
copy of x into a buffer of I + R columns and, each step, of B beside W, and several adapters would need columns of their
own: not done.

Letters: T tokens, I input features, O output features, J projections, R rank, n tokens of one range.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..products import linear, summed_matmuls
from ..registration import on_its_device
from .kernel_segments import gradient, narrow, widen
from .ranges import Gradients, LoraRange
from .tables import Layout, Tables, build_tables


def _factors(ranges: Sequence[LoraRange]) -> list[Tensor]:
    """Every factor in the order in which they are packed."""
    pairs = [pair for part in ranges for pair in part.factors if pair is not None]
    return [pair[0] for pair in pairs] + [pair[1] for pair in pairs]


def _pack(ranges: Sequence[LoraRange], x: Tensor, tables: Tables) -> Tensor:
    """All factors in x's dtype, one behind the other: one launch, and half the bytes of float32 to read."""
    packed = x.new_empty(sum(tables.packed_sizes))
    torch._foreach_copy_(
        list(packed.split(tables.packed_sizes)), [factor.detach().reshape(-1) for factor in _factors(ranges)]
    )
    return packed


def _masks(ranges: Sequence[LoraRange], x: Tensor) -> tuple[Tensor | None, list[Tensor]]:
    """The address of every range's mask (0 without one), and the masks, which must outlive the launches."""
    if all(part.mask is None for part in ranges):
        return None, []
    addresses, kept = [], []
    for part in ranges:
        address = 0
        if part.mask is not None:
            mask = part.mask.to(x.dtype).contiguous()
            if mask.data_ptr() % 16:  # the kernels load 16 bytes at a time
                mask = mask.clone()
            kept.append(mask)
            address = mask.data_ptr()
        addresses.append(address)
    table = torch.tensor(addresses, dtype=torch.int64)
    return table.pin_memory().to(x.device, non_blocking=True) if x.is_cuda else table, kept


@on_its_device
def lora_linear_forward(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], ranges: Sequence[LoraRange]
) -> tuple[list[Tensor], list[Tensor]]:
    """As the reference's; the narrow rows of several ranges are computed side by side and then given tensors of their
    own, because what an operator returns must not share memory."""
    x = x.contiguous()
    outputs = [linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    tables = build_tables(Layout.of(x, weights, ranges))
    if not tables.packed_sizes:
        return outputs, [x.new_empty(part.end - part.start, 0) for part in ranges]
    packed = _pack(ranges, x, tables)
    masks, _kept = _masks(ranges, x)
    rows = x.new_empty(sum(tables.narrow_sizes))
    narrow(x, masks, packed, rows, tables, tables.a)
    for y, table in zip(outputs, tables.b, strict=True):
        widen(y, None, packed, rows, tables, table)
    parts = [
        own.view(part.end - part.start, width)
        for part, own, width in zip(ranges, rows.split(tables.narrow_sizes), tables.widths, strict=True)
    ]
    if len(parts) == 1:
        return outputs, parts
    lowered = [torch.empty_like(part) for part in parts]
    torch._foreach_copy_(lowered, parts)
    return outputs, lowered


@on_its_device
def lora_linear_backward(
    d_outputs: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    ranges: Sequence[LoraRange],
    lowered: Sequence[Tensor],
    needs_dx: bool,
) -> tuple[Tensor | None, Gradients]:
    """As the reference's."""
    x = x.contiguous()
    d_outputs = [dy.contiguous() for dy in d_outputs]
    dx = summed_matmuls(d_outputs, weights) if needs_dx else None
    tables = build_tables(Layout.of(x, weights, ranges))
    if not tables.packed_sizes:
        return dx, [[None] * len(part.factors) for part in ranges]
    packed = _pack(ranges, x, tables)
    masks, _kept = _masks(ranges, x)
    rows = torch.cat([own.reshape(-1) for own in lowered])
    d_rows = torch.empty_like(rows)
    gradients = packed.new_empty(packed.shape, dtype=torch.float32)
    for dy, table in zip(d_outputs, tables.b, strict=True):
        narrow(dy, None, packed, d_rows, tables, table)
        gradient(dy, None, gradients, rows, tables, table)
    gradient(x, masks, gradients, d_rows, tables, tables.a)
    if dx is not None:
        widen(dx, masks, packed, d_rows, tables, tables.a)
    own = [torch.empty(factor.shape, dtype=factor.dtype, device=factor.device) for factor in _factors(ranges)]
    torch._foreach_copy_([factor.view(-1) for factor in own], list(gradients.split(tables.packed_sizes)))
    pairs = iter(zip(own[: len(own) // 2], own[len(own) // 2 :], strict=True))
    return dx, [[next(pairs) if pair is not None else None for pair in part.factors] for part in ranges]
