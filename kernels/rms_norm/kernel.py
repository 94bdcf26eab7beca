"""Root-mean-square normalisation in Triton, forward and backward.

Letters: N rows, D features, ... any leading shape.
"""

# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..registration import on_its_device


@triton.jit
def _forward(x_ptr, weight_ptr, y_ptr, rstd_ptr, N, D, EPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    wide = rstd_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    column = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    inside = (row < N)[:, None] & (column < D)[None, :]
    offsets = row[:, None] * D + column[None, :]
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(wide)
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(wide)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / D + EPS)  # [BLOCK_N]
    normed = (x * rstd[:, None]).to(y_ptr.dtype.element_ty).to(wide)
    tl.store(y_ptr + offsets, (normed * weight[None, :]).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(rstd_ptr + row, rstd, mask=row < N)


@triton.jit
def _backward(dy_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, N, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    wide = rstd_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    column = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    inside = (row < N)[:, None] & (column < D)[None, :]
    offsets = row[:, None] * D + column[None, :]
    rstd = tl.load(rstd_ptr + row, mask=row < N, other=0.0)[:, None]  # [BLOCK_N, 1]
    normed = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(wide) * rstd
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(wide)
    g = tl.load(dy_ptr + offsets, mask=inside, other=0.0).to(wide) * weight[None, :]
    slope = tl.sum(g * normed, axis=1)[:, None] / D
    tl.store(dx_ptr + offsets, ((g - normed * slope) * rstd).to(dx_ptr.dtype.element_ty), mask=inside)


def _blocks(rows: int, size: int) -> tuple[tuple[int], dict[str, int]]:
    """The grid and its blocks: whole rows, as many of them as make about 2048 elements."""
    block_d = triton.next_power_of_2(size)
    block_n = max(1, 2048 // block_d)
    warps = min(16, max(4, block_n * block_d // 1024))
    return (triton.cdiv(rows, block_n),), {"BLOCK_N": block_n, "BLOCK_D": block_d, "num_warps": warps}


@on_its_device
def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As the reference's, with x read once."""
    x = x.contiguous()
    size = x.shape[-1]
    y = torch.empty_like(x)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rstd = torch.empty((*x.shape[:-1], 1), dtype=wide, device=x.device)
    if rstd.numel():
        grid, blocks = _blocks(rstd.numel(), size)
        _forward[grid](x, weight.contiguous(), y, rstd, rstd.numel(), size, EPS=eps, **blocks)
    return y, rstd


@on_its_device
def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """As the reference's, with dy and x read once."""
    dy, x, size = dy.contiguous(), x.contiguous(), x.shape[-1]
    dx = torch.empty_like(x)
    if rstd.numel():
        grid, blocks = _blocks(rstd.numel(), size)
        _backward[grid](dy, x, weight.contiguous(), rstd, dx, rstd.numel(), size, **blocks)
    return dx
