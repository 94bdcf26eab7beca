"""One matrix a group on rows sorted by group, in plain PyTorch: the product and its two gradients.

Letters: N rows, G groups, I input features, O output features.
"""

import torch
from torch import Tensor

_FAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def grouped_matmul_forward(x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """``y_n = W_g x_n`` for every row n of group g.

    Args:
        x: ``[N, I]``, rows sorted by group.
        weights: ``[G, O, I]``, of any dtype: the products run in x's.
        offsets: int32 ``[G + 1]``, from 0 to N; group g is the rows ``offsets[g]:offsets[g + 1]``.

    Returns:
        ``[N, O]`` in x's dtype.
    """
    x, weights = x.contiguous(), weights.to(x.dtype).contiguous()
    if _fast(x, weights, x.shape[1], weights.shape[1]):
        return torch.nn.functional.grouped_mm(x, weights.transpose(1, 2), offs=offsets[1:])
    y = x.new_empty(x.shape[0], weights.shape[1])
    for group, start, end in _groups(offsets):
        torch.mm(x[start:end], weights[group].T, out=y[start:end])
    return y


def grouped_matmul_dx(dy: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """``dx_n = W_g^T dy_n``, ``[N, I]`` in dy's dtype."""
    dy, weights = dy.contiguous(), weights.to(dy.dtype).contiguous()
    if _fast(dy, weights, dy.shape[1], weights.shape[2]):
        return torch.nn.functional.grouped_mm(dy, weights, offs=offsets[1:])
    dx = dy.new_empty(dy.shape[0], weights.shape[2])
    for group, start, end in _groups(offsets):
        torch.mm(dy[start:end], weights[group], out=dx[start:end])
    return dx


def grouped_matmul_dw(dy: Tensor, x: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """``dW_g = sum_n dy_n x_n^T`` over the rows of group g (zero where it has none), ``[G, O, I]`` in ``dtype``."""
    dy, x = dy.contiguous(), x.contiguous()
    if _fast(dy, x, dy.shape[1], x.shape[1]):
        return torch.nn.functional.grouped_mm(dy.T, x, offs=offsets[1:]).to(dtype)
    dw = torch.empty(offsets.shape[0] - 1, dy.shape[1], x.shape[1], dtype=dtype, device=x.device)
    for group, start, end in _groups(offsets):
        dw[group] = dy[start:end].T @ x[start:end]
    return dw


def _groups(offsets: Tensor) -> list[tuple[int, int, int]]:
    ends = offsets.tolist()
    return [(group, ends[group], ends[group + 1]) for group in range(len(ends) - 1)]


def _fast(left: Tensor, right: Tensor, *row_lengths: int) -> bool:
    """Whether torch's grouped_mm takes these operands: no float64, and rows that start at multiples of 16 bytes.

    It takes a product whose rows do not, too, but returns them with gaps between them.
    """
    return left.dtype in _FAST_DTYPES and all(
        place % 16 == 0
        for place in (
            left.data_ptr(),
            right.data_ptr(),
            *(length * left.element_size() for length in row_lengths),
        )
    )
