"""Matrix products by the faster of torch's two libraries on a CPU, and batch-invariant where that is asked for.

``torch.mm`` gives float32 to MKL, which runs half as fast as oneDNN on CPUs that it does not know (measured on AMD's
Zen 5: 180 against 400 GFLOP/s); 16-bit types go to oneDNN already.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .invariance import is_batch_invariant

# Tokens from which a forward product goes to oneDNN. For the few of generation there is nothing to gain, and MKL's
# results depend less on how many are multiplied at once: neighbours in a batch move logits less.
MANY = 128
# oneDNN's bfloat16 products on a CPU with AMX read behind the end of a row whose length is no multiple of 8, into the
# next row, and multiply what they find by zero. From a row with a NaN or an infinity that makes a NaN in the row before
# it, which may be another adapter's. Seen with torch 2.13; rows of these lengths are filled up to whole tiles instead.
SAFE_LENGTH, TILE = 8, 32
# Rows of a product where the number of all rows must not decide how it is added up.
ROWS_AT_A_TIME = 128
# And a length that every row begins at the same alignment with: MKL's float64 products of rows of 7 numbers give a row
# that begins 8 bytes behind a multiple of 16 other bits (seen on AMD's Zen 5).
ALIGNED_LENGTH = 16


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b`` of ``[tokens, I]`` and ``[O, I]``; either may be a transposed view."""
    if x.shape[0] >= MANY or is_batch_invariant():
        return _product(x, weight, bias)
    return torch.nn.functional.linear(*_whole_tiles(x, weight), bias)


def matmul_t(a: Tensor, b: Tensor) -> Tensor:
    """``a b^T`` of ``[tokens, I]`` and ``[O, I]``; either may be a transposed view."""
    return linear(a, b)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a b`` of ``[rows, I]`` and ``[I, O]``, as backwards need it; either may be a transposed view."""
    return _product(a, b.T, None)


def add_matmul_(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out += a b``, by the product itself where its library is the faster one: so it costs no pass of its own.

    Batch-invariant, it does.
    """
    if is_batch_invariant() or (out.dtype == torch.float32 and out.device.type == "cpu"):
        out.add_(matmul(a, b))
    else:
        rows, columns = _whole_tiles(a, b.T)
        out.addmm_(rows, columns.T)


def matmul_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out = a b``, of any memory that has room for it."""
    if is_batch_invariant():
        out.copy_(matmul(a, b))
    else:
        torch.mm(a, b, out=out)


def summed_matmuls(factors: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """The sum of ``a_j b_j`` of ``[rows, I_j]`` and ``[I_j, O]``, in memory of its own."""
    out = matmul(factors[0], weights[0])
    for factor, weight in zip(factors[1:], weights[1:], strict=True):
        add_matmul_(out, factor, weight)
    return out


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not is_batch_invariant():
        return _whole_product(x, weight, bias)
    out = x.new_empty(x.shape[0], weight.shape[0])
    behind = -x.shape[1] % ALIGNED_LENGTH
    weight = torch.nn.functional.pad(weight, (0, behind)) if behind else weight
    for rows, own in zip(x.split(ROWS_AT_A_TIME), out.split(ROWS_AT_A_TIME), strict=True):
        zeros = (0, behind, 0, ROWS_AT_A_TIME - rows.shape[0])
        tile = torch.nn.functional.pad(rows, zeros) if any(zeros) else rows.contiguous()
        own.copy_(_whole_product(tile, weight, bias)[: rows.shape[0]])
    return out


def _whole_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    on_onednn = x.dtype == torch.float32 and x.device.type == "cpu" and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if on_onednn and x.numel() and weight.numel():  # it takes no empty operand
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return result
    return torch.nn.functional.linear(*_whole_tiles(x, weight), bias)


def _whole_tiles(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both factors ``[tokens, I]`` and ``[O, I]`` as they are, or zeros behind their rows where those are read past."""
    length = x.shape[1]
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or length % SAFE_LENGTH == 0:
        return x, weight
    zeros = (0, -length % TILE)
    return torch.nn.functional.pad(x, zeros), torch.nn.functional.pad(weight, zeros)


@contextmanager
def products_of_16_bits(dtype: torch.dtype) -> Iterator[None]:
    """Within it, batched float32 products of ``dtype``'s values run twice as fast on a CPU that has bfloat16.

    oneDNN rounds float32 factors to bfloat16, which changes nothing in bfloat16's own values, and adds their products
    up in float32: torch has no product of bfloat16 tensors with a float32 result on a CPU. The switch is the whole
    process's: float32 products that another thread begins meanwhile are rounded, too.
    """
    if dtype != torch.bfloat16:
        yield
        return
    switch = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # torch makes it at import
    before = switch.fp32_precision
    switch.fp32_precision = "bf16"
    try:
        yield
    finally:
        switch.fp32_precision = before
