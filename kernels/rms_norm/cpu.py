"""Root-mean-square normalisation in compiled C++.

Letters: N rows, D features, ... any leading shape.
"""

import torch
from torch import Tensor

from ..compiled import CompiledFunction

_forward = CompiledFunction("rms_norm_forward", "ppppiid")
_scaled = CompiledFunction("rms_norm_scaled", "ppppii")
_backward = CompiledFunction("rms_norm_backward", "pppppii")


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As the reference's."""
    x, weight = x.contiguous(), weight.contiguous()
    y = torch.empty_like(x)
    rstd = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    _forward(x.dtype, x, weight, y, rstd, rstd.numel(), x.shape[-1], eps)
    return y, rstd


def scaled(x: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    """As the reference's: the forward's y, to the bit."""
    x, rstd, weight = x.contiguous(), rstd.contiguous(), weight.contiguous()
    y = torch.empty_like(x)
    _scaled(x.dtype, x, rstd, weight, y, rstd.numel(), x.shape[-1])
    return y


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """As the reference's, rounded once."""
    dy, x, weight, rstd = dy.contiguous(), x.contiguous(), weight.contiguous(), rstd.contiguous()
    dx = torch.empty_like(x)
    _backward(x.dtype, dy, x, weight, rstd, dx, rstd.numel(), x.shape[-1])
    return dx
