"""Products of several adapters' rows, each with matrices of their own, in as few calls as possible.

Parts of one length are one batched product; others are one product each. No part meets another's matrix.

Letters: P parts, T rows of all parts, n rows of one, I and O features, R columns.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .invariance import is_batch_invariant
from .products import linear, matmul


def times(x: Tensor, matrices: Tensor, lengths: Sequence[int]) -> Tensor:
    """``x_p M_p`` of ``[T, I]`` and ``[P, I, O]``, ``[T, O]``."""
    if len(lengths) == 1:
        return linear(x, matrices[0].mT)
    if _batched(x, lengths):
        return torch.bmm(x.unflatten(0, (len(lengths), -1)), matrices).flatten(0, 1)
    cut = list(lengths)
    return torch.cat([linear(rows, matrix.mT) for rows, matrix in zip(x.split(cut), matrices, strict=True)])


def transposed_times(columns: Tensor, x: Tensor, lengths: Sequence[int]) -> Tensor:
    """``columns_p x_p`` of ``[R, T]`` or, of parts of one length, ``[P, R, n]``, and ``[T, I]``; ``[P, R, I]``."""
    if len(lengths) == 1:
        return matmul(columns, x)[None]
    if columns.dim() == 3:
        return torch.bmm(columns, x.unflatten(0, (len(lengths), -1)))
    cut = list(lengths)
    return torch.stack([matmul(own, rows) for own, rows in zip(columns.split(cut, dim=1), x.split(cut), strict=True)])


def columns_by_part(values: Tensor, places: Tensor | None, width: int, lengths: Sequence[int]) -> Tensor:
    """Rows turned into the columns that ``transposed_times`` takes.

    Laid out so because oneDNN multiplies a narrow operand faster when it need not transpose it.

    Args:
        values: ``[T, R]``.
        places: LongTensor ``[T, R]``, each value's row among ``width``, others become zero; None: ``width`` is R and
            each value keeps its place.
        width: rows of the result.
        lengths: the parts' n.
    """
    if _batched(values, lengths):
        turned = values.unflatten(0, (len(lengths), -1)).transpose(1, 2)  # [P, R, n]
        if places is None:
            return turned.contiguous()
        wide = values.new_zeros(len(lengths), width, lengths[0])
        return wide.scatter_(1, places.unflatten(0, (len(lengths), -1)).transpose(1, 2), turned)
    if places is None:
        return values.T.contiguous()
    return values.new_zeros(width, values.shape[0]).scatter_(0, places.T, values.T)


def _batched(x: Tensor, lengths: Sequence[int]) -> bool:
    """16-bit batches are oneDNN's; those of float32 would be MKL's (see ``products``)."""
    is_wanted = len(lengths) > 1 and x.element_size() == 2 and not is_batch_invariant()
    return is_wanted and min(lengths) == max(lengths) > 0
