"""Triton kernels of one matrix a group on rows sorted by group: the product, and the gradient of the matrices.

The groups' sizes stay on the device: every program finds its group in the offsets, and the grid is as large as any
split of the rows could need. A row tile never crosses a group's border.

Letters: N rows, G groups, I input features, O output features, S parts of a group's rows.
"""

# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..registration import on_its_device

# Programs that fill a large GPU's some 130 multiprocessors twice.
_ENOUGH_PROGRAMS = 264


@triton.jit
def _product_kernel(
    rows_ptr,
    weights_ptr,
    offsets_ptr,
    out_ptr,
    num_groups,
    num_tiles,
    depth,
    width,
    weight_size,
    stride_depth,
    stride_width,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BAND: tl.constexpr,
):
    # Bands of row tiles go through all columns together, so that what they share is still in the L2 cache.
    band_programs = BAND * tl.cdiv(width, BLOCK_W)
    band = tl.program_id(0) // band_programs
    band_tiles = tl.minimum(num_tiles - band * BAND, BAND)
    tile = band * BAND + tl.program_id(0) % band_programs % band_tiles
    column_tile = tl.program_id(0) % band_programs // band_tiles

    groups = tl.arange(0, BLOCK_G)
    starts = tl.load(offsets_ptr + groups, groups < num_groups, 0)
    ends = tl.load(offsets_ptr + groups + 1, groups < num_groups, 0)
    tiles = (ends - starts + BLOCK_N - 1) // BLOCK_N
    group = tl.sum((tl.cumsum(tiles) <= tile).to(tl.int32))  # groups whose tiles all come before this one
    if group < num_groups:
        earlier = tl.sum(tl.where(groups < group, tiles, 0))
        first = tl.load(offsets_ptr + group) + (tile - earlier) * BLOCK_N
        end = tl.load(offsets_ptr + group + 1)
        rows = first + tl.arange(0, BLOCK_N)
        columns = column_tile * BLOCK_W + tl.arange(0, BLOCK_W)
        total = tl.zeros((BLOCK_N, BLOCK_W), tl.float32)
        for offset in range(0, depth, BLOCK_D):
            depths = offset + tl.arange(0, BLOCK_D)
            present = (rows < end)[:, None] & (depths < depth)[None, :]
            values = tl.load(rows_ptr + rows.to(tl.int64)[:, None] * depth + depths[None, :], present, 0.0)
            places = depths[:, None] * stride_depth + columns[None, :] * stride_width
            present = (depths < depth)[:, None] & (columns < width)[None, :]
            weights = tl.load(weights_ptr + group.to(tl.int64) * weight_size + places, present, 0.0)
            total = tl.dot(values, weights, total, input_precision="ieee")
        present = (rows < end)[:, None] & (columns < width)[None, :]
        places = rows.to(tl.int64)[:, None] * width + columns[None, :]
        tl.store(out_ptr + places, total.to(out_ptr.dtype.element_ty), present)


@triton.jit
def _gradient_kernel(
    dy_ptr,
    x_ptr,
    offsets_ptr,
    out_ptr,
    num_outputs,
    num_inputs,
    NUM_PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    input_tiles = tl.cdiv(num_inputs, BLOCK_I)
    outputs = tl.program_id(0) // input_tiles * BLOCK_O + tl.arange(0, BLOCK_O)
    inputs = tl.program_id(0) % input_tiles * BLOCK_I + tl.arange(0, BLOCK_I)
    group = tl.program_id(1)
    start, end = tl.load(offsets_ptr + group), tl.load(offsets_ptr + group + 1)
    part_rows = tl.cdiv(end - start, NUM_PARTS)
    first = start + tl.program_id(2) * part_rows
    last = tl.minimum(first + part_rows, end)
    total = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for offset in range(first, last, BLOCK_N):
        rows = offset + tl.arange(0, BLOCK_N)
        present = (rows < last)[:, None] & (outputs < num_outputs)[None, :]
        dy = tl.load(dy_ptr + rows.to(tl.int64)[:, None] * num_outputs + outputs[None, :], present, 0.0)
        present = (rows < last)[:, None] & (inputs < num_inputs)[None, :]
        x = tl.load(x_ptr + rows.to(tl.int64)[:, None] * num_inputs + inputs[None, :], present, 0.0)
        total = tl.dot(tl.trans(dy), x, total, input_precision="ieee")
    place = (tl.program_id(2) * tl.num_programs(1) + group).to(tl.int64) * num_outputs * num_inputs
    places = outputs[:, None] * num_inputs + inputs[None, :]
    present = (outputs < num_outputs)[:, None] & (inputs < num_inputs)[None, :]
    tl.store(out_ptr + place + places, total.to(out_ptr.dtype.element_ty), present)


def _product(rows: Tensor, weights: Tensor, offsets: Tensor, width: int, strides: tuple[int, int]) -> Tensor:
    """``[N, width]``, each row times its group's matrix, whose depth and width lie ``strides`` apart."""
    rows, weights = rows.contiguous(), weights.to(rows.dtype).contiguous()
    num_rows, depth = rows.shape
    num_groups = weights.shape[0]
    out = rows.new_empty(num_rows, width)
    if out.numel() == 0:
        return out
    small = rows.dtype == torch.float32 or num_rows < 64 * num_groups  # few rows a group, or twice the shared memory
    block_n = 64 if small else 128
    block_w = 64 if small else 128
    num_tiles = num_rows // block_n + min(num_groups, num_rows)  # of every group the last tile may be partly filled
    _product_kernel[(num_tiles * triton.cdiv(width, block_w),)](
        rows,
        weights,
        offsets,
        out,
        num_groups,
        num_tiles,
        depth,
        width,
        weights.shape[1] * weights.shape[2],
        *strides,
        BLOCK_G=triton.next_power_of_2(num_groups),
        BLOCK_N=block_n,
        BLOCK_W=block_w,
        BLOCK_D=32 if rows.dtype == torch.float32 else 64,
        BAND=8,
        num_warps=4 if small else 8,
        num_stages=3,
    )
    return out


@on_its_device
def grouped_matmul_forward(x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """As the reference's."""
    return _product(x, weights, offsets, weights.shape[1], (1, weights.shape[2]))


@on_its_device
def grouped_matmul_dx(dy: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """As the reference's."""
    return _product(dy, weights, offsets, weights.shape[2], (weights.shape[2], 1))


@on_its_device
def grouped_matmul_dw(dy: Tensor, x: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """As the reference's. A tile's rows are added in their order, or in parts whose sums are added in theirs."""
    dy, x = dy.contiguous(), x.contiguous()
    num_groups = offsets.shape[0] - 1
    shape = (num_groups, dy.shape[1], x.shape[1])
    if 0 in shape:
        return torch.empty(shape, dtype=dtype, device=x.device)
    block = 64
    tiles = triton.cdiv(shape[1], block) * triton.cdiv(shape[2], block)
    # Parts of about 256 rows at the least, were the rows spread evenly; their number depends on shapes alone.
    wanted = min(_ENOUGH_PROGRAMS // (tiles * num_groups), x.shape[0] // (256 * num_groups))
    parts = triton.next_power_of_2(max(1, wanted))
    sums = torch.empty((parts, *shape), dtype=dtype if parts == 1 else torch.float32, device=x.device)
    _gradient_kernel[(tiles, num_groups, parts)](
        dy,
        x,
        offsets,
        sums,
        shape[1],
        shape[2],
        NUM_PARTS=parts,
        BLOCK_N=32 if x.dtype == torch.float32 else 64,
        BLOCK_O=block,
        BLOCK_I=block,
        num_warps=4,
        num_stages=3,
    )
    return sums[0] if parts == 1 else sums.sum(0).to(dtype)
