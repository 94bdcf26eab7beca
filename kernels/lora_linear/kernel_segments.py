"""Triton kernels of many low-rank factors at once, each on the rows of its own token range.

Every kernel finds its range in a table and never reads, or multiplies by zero, a row of another::

    narrow    wide rows to ranks               narrow = s (m * wide) F
    widen     ranks to wide rows, added        wide += m * s narrow F^T
    gradient  of a factor, chunk by chunk      dF = s narrow^T (m * wide)
    reduce    adds a factor's chunks in their order, so that the same inputs give the same bits

Letters: T tokens, F features (the wide side), R rank, G ranges.
"""

# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tables import FIELDS, FactorTable, Tables

_FIELDS = tl.constexpr(FIELDS)


@triton.jit
def _factor(factors_ptr, scales_ptr, group, RANK_ALIGN: tl.constexpr, OFFSET_ALIGN: tl.constexpr):
    """A range's row of a factor table."""
    row = factors_ptr + group * _FIELDS
    start, end = tl.load(row), tl.load(row + 1)
    rank = tl.multiple_of(tl.load(row + 2), RANK_ALIGN)
    column = tl.multiple_of(tl.load(row + 3), RANK_ALIGN)
    width = tl.multiple_of(tl.load(row + 4), RANK_ALIGN)
    narrow_offset = tl.multiple_of(tl.load(row + 5), RANK_ALIGN)
    factor_offset = tl.multiple_of(tl.load(row + 6), OFFSET_ALIGN)
    scale = tl.load(scales_ptr + group * _FIELDS + 7)
    return start, end, rank, column, width, narrow_offset, factor_offset, scale


@triton.jit
def _dropout(wide, masks_ptr, group, relative, inside):
    """``wide`` times its range's mask, where it has one: masks lie anywhere, so they come as addresses."""
    address = tl.load(masks_ptr + group)
    mask_ptr = tl.multiple_of(address.to(tl.pointer_type(wide.dtype)), 16)
    mask = tl.load(mask_ptr + relative, mask=inside & (address != 0), other=1.0)
    return (wide.to(tl.float32) * mask.to(tl.float32)).to(wide.dtype)


@triton.jit
def _narrow_kernel(
    wide_ptr,
    masks_ptr,
    packed_ptr,
    narrow_ptr,
    tiles_ptr,
    factors_ptr,
    scales_ptr,
    num_features,
    MASKED: tl.constexpr,
    STACKED: tl.constexpr,
    RANK_ALIGN: tl.constexpr,
    OFFSET_ALIGN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    group = tl.load(tiles_ptr + 2 * tl.program_id(0))
    first = tl.load(tiles_ptr + 2 * tl.program_id(0) + 1)
    start, end, rank, column, width, narrow_offset, factor_offset, scale = _factor(
        factors_ptr, scales_ptr, group, RANK_ALIGN, OFFSET_ALIGN
    )
    tokens = first + tl.arange(0, BLOCK_T)
    ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    # A range of a smaller rank than the grid was made for has nothing to do in its last blocks.
    last = tl.where(tl.program_id(1) * BLOCK_R < rank, num_features, 0)
    total = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for offset in range(0, last, BLOCK_F):
        features = offset + tl.arange(0, BLOCK_F)
        inside = (tokens < end)[:, None] & (features < num_features)[None, :]
        wide = tl.load(wide_ptr + tokens.to(tl.int64)[:, None] * num_features + features[None, :], inside, 0.0)
        if MASKED:
            relative = (tokens - start).to(tl.int64)[:, None] * num_features + features[None, :]
            wide = _dropout(wide, masks_ptr, group, relative, inside)
        if STACKED:
            places = ranks[None, :] * num_features + features[:, None]
        else:
            places = features[:, None] * rank + ranks[None, :]
        present = (ranks < rank)[None, :] & (features < num_features)[:, None]
        factor = tl.load(packed_ptr + factor_offset + places, present, 0.0)  # [BLOCK_F, BLOCK_R]
        total = tl.dot(wide, factor, total, input_precision="ieee")
    places = narrow_offset + (tokens - start)[:, None] * width + column + ranks[None, :]
    inside = (tokens < end)[:, None] & (ranks < rank)[None, :]
    tl.store(narrow_ptr + places, (total * scale).to(narrow_ptr.dtype.element_ty), inside)


@triton.jit
def _widen_kernel(
    wide_ptr,
    masks_ptr,
    packed_ptr,
    narrow_ptr,
    tiles_ptr,
    factors_ptr,
    scales_ptr,
    num_features,
    MASKED: tl.constexpr,
    STACKED: tl.constexpr,
    RANK_ALIGN: tl.constexpr,
    OFFSET_ALIGN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    group = tl.load(tiles_ptr + 2 * tl.program_id(1))
    first = tl.load(tiles_ptr + 2 * tl.program_id(1) + 1)
    start, end, rank, column, width, narrow_offset, factor_offset, scale = _factor(
        factors_ptr, scales_ptr, group, RANK_ALIGN, OFFSET_ALIGN
    )
    if rank > 0:  # a range may have no factors on this projection: its rows are left unread
        tokens = first + tl.arange(0, BLOCK_T)
        features = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
        inside = (tokens < end)[:, None] & (features < num_features)[None, :]
        addresses = wide_ptr + tokens.to(tl.int64)[:, None] * num_features + features[None, :]
        wide = tl.load(addresses, inside, 0.0)
        total = tl.zeros((BLOCK_T, BLOCK_F), tl.float32)
        for offset in range(0, rank, BLOCK_R):
            ranks = offset + tl.arange(0, BLOCK_R)
            places = narrow_offset + (tokens - start)[:, None] * width + column + ranks[None, :]
            narrow = tl.load(narrow_ptr + places, (tokens < end)[:, None] & (ranks < rank)[None, :], 0.0)
            if STACKED:
                places = ranks[:, None] * num_features + features[None, :]
            else:
                places = features[None, :] * rank + ranks[:, None]
            present = (ranks < rank)[:, None] & (features < num_features)[None, :]
            factor = tl.load(packed_ptr + factor_offset + places, present, 0.0)  # [BLOCK_R, BLOCK_F]
            total = tl.dot(narrow, factor, total, input_precision="ieee")
        total *= scale
        if MASKED:
            relative = (tokens - start).to(tl.int64)[:, None] * num_features + features[None, :]
            # The product is rounded as the plain computation's is, and so is its masking.
            total = _dropout(total.to(wide.dtype), masks_ptr, group, relative, inside).to(tl.float32)
        tl.store(addresses, (wide.to(tl.float32) + total).to(wide.dtype), inside)


@triton.jit
def _gradient_kernel(
    wide_ptr,
    masks_ptr,
    partials_ptr,
    narrow_ptr,
    chunks_ptr,
    factors_ptr,
    scales_ptr,
    num_features,
    partial_size,
    MASKED: tl.constexpr,
    STACKED: tl.constexpr,
    RANK_ALIGN: tl.constexpr,
    OFFSET_ALIGN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    chunk = tl.program_id(1)
    group = tl.load(chunks_ptr + 3 * chunk)
    first, last = tl.load(chunks_ptr + 3 * chunk + 1), tl.load(chunks_ptr + 3 * chunk + 2)
    start, _, rank, column, width, narrow_offset, _, scale = _factor(
        factors_ptr, scales_ptr, group, RANK_ALIGN, OFFSET_ALIGN
    )
    features = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    last = tl.where(tl.program_id(2) * BLOCK_R < rank, last, first)
    total = tl.zeros((BLOCK_R, BLOCK_F), tl.float32)
    for offset in range(first, last, BLOCK_T):
        tokens = offset + tl.arange(0, BLOCK_T)
        inside = (tokens < last)[:, None] & (features < num_features)[None, :]
        wide = tl.load(wide_ptr + tokens.to(tl.int64)[:, None] * num_features + features[None, :], inside, 0.0)
        if MASKED:
            relative = (tokens - start).to(tl.int64)[:, None] * num_features + features[None, :]
            wide = _dropout(wide, masks_ptr, group, relative, inside)
        places = narrow_offset + (tokens - start)[None, :] * width + column + ranks[:, None]
        narrow = tl.load(narrow_ptr + places, (ranks < rank)[:, None] & (tokens < last)[None, :], 0.0)
        total = tl.dot(narrow, wide, total, input_precision="ieee")
    if STACKED:
        places = ranks[:, None] * num_features + features[None, :]
    else:
        places = features[None, :] * rank + ranks[:, None]
    present = (ranks < rank)[:, None] & (features < num_features)[None, :]
    tl.store(partials_ptr + chunk.to(tl.int64) * partial_size + places, total * scale, present)


@triton.jit
def _reduce_kernel(partials_ptr, gradients_ptr, factors_ptr, num_features, partial_size, BLOCK: tl.constexpr):
    row = factors_ptr + tl.program_id(1) * _FIELDS
    rank, factor_offset = tl.load(row + 2), tl.load(row + 6)
    first, count = tl.load(row + 8), tl.load(row + 9)
    elements = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    present = elements < rank * num_features
    total = tl.zeros((BLOCK,), tl.float32)
    addresses = partials_ptr + first.to(tl.int64) * partial_size + elements
    for _ in range(count):
        total += tl.load(addresses, present, 0.0)
        addresses += partial_size
    tl.store(gradients_ptr + factor_offset + elements, total, present)


def _rank_block(table: FactorTable) -> int:
    return min(64, max(16, triton.next_power_of_2(table.max_rank)))


def _constants(table: FactorTable, masks: Tensor | None) -> dict[str, object]:
    return {
        "MASKED": masks is not None,
        "STACKED": table.stacked,
        "RANK_ALIGN": table.rank_align,
        "OFFSET_ALIGN": table.offset_align,
        "BLOCK_R": _rank_block(table),
        "num_warps": 4,
    }


def _stages(tensor: Tensor) -> int:
    """Loads in flight, as many as shared memory holds."""
    return 2 if tensor.dtype == torch.float32 else 4


def narrow(
    wide: Tensor, masks: Tensor | None, packed: Tensor, narrow: Tensor, tables: Tables, table: FactorTable
) -> None:
    """``narrow = s (m * wide) F``, in place."""
    if not len(tables.tiles) or not table.max_rank:
        return
    _narrow_kernel[(len(tables.tiles), triton.cdiv(table.max_rank, _rank_block(table)))](
        wide,
        masks,
        packed,
        narrow,
        tables.tiles,
        table.ints,
        table.floats,
        table.features,
        BLOCK_T=tables.tile_tokens,
        BLOCK_F=64,
        num_stages=_stages(wide),
        **_constants(table, masks),
    )


def widen(
    wide: Tensor, masks: Tensor | None, packed: Tensor, narrow: Tensor, tables: Tables, table: FactorTable
) -> None:
    """``wide += m * s narrow F^T``, in place."""
    if not len(tables.tiles) or not table.max_rank:
        return
    _widen_kernel[(triton.cdiv(table.features, 128), len(tables.tiles))](
        wide,
        masks,
        packed,
        narrow,
        tables.tiles,
        table.ints,
        table.floats,
        table.features,
        BLOCK_T=tables.tile_tokens,
        BLOCK_F=128,
        num_stages=1,
        **_constants(table, masks),
    )


def gradient(
    wide: Tensor, masks: Tensor | None, gradients: Tensor, narrow: Tensor, tables: Tables, table: FactorTable
) -> None:
    """``s narrow^T (m * wide)`` of every range, into its factor's place among all gradients."""
    partial_size = table.max_rank * table.features
    if not partial_size:
        return
    partials = wide.new_empty(len(tables.chunks), partial_size, dtype=torch.float32)
    if len(tables.chunks):
        blocks = (triton.cdiv(table.features, 64), len(tables.chunks), triton.cdiv(table.max_rank, _rank_block(table)))
        _gradient_kernel[blocks](
            wide,
            masks,
            partials,
            narrow,
            tables.chunks,
            table.ints,
            table.floats,
            table.features,
            partial_size,
            BLOCK_T=64,
            BLOCK_F=64,
            num_stages=_stages(wide),
            **_constants(table, masks),
        )
    _reduce_kernel[(triton.cdiv(partial_size, 1024), len(table.ints))](
        partials, gradients, table.ints, table.features, partial_size, BLOCK=1024, num_warps=4
    )
