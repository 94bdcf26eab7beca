"""Root-mean-square normalisation in plain PyTorch, forward and backward.

Letters: N rows, D features, ... any leading shape.
"""

import math

import torch
from torch import Tensor


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``y = weight * (x / rms(x))``, the quotient rounded to x's dtype as LLaMA's own code does.

    Args:
        x: ``[..., D]``.
        weight: ``[D]`` in x's dtype.
        eps: added to the mean square.

    Returns:
        y ``[..., D]`` in x's dtype and ``rstd = 1 / rms(x)`` ``[..., 1]``, at least float32.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    x = x.contiguous()
    # The norm reads a narrow x and accumulates wide, with no converted copy of x.
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)  # [..., 1]
    rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return scaled(x, rstd, weight), rstd


def scaled(x: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    """``weight * (x * rstd)`` ``[..., D]``, the product in the bracket rounded to x's dtype."""
    return torch.mul(x, rstd).to(x.dtype).mul_(weight)


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """Gradient of y with respect to x.

    With ``g = dy * weight``: ``dx = rstd * (g - x * <g, x> * rstd^2 / D)``.

    torch's backward of weight normalisation is ``dx = s / n * (g - x * <g, x> / n^2)`` with ``n`` and ``s`` given: with
    ``n = sqrt(D) / rstd`` and ``s = sqrt(D)`` the same thing, in one pass over memory and with float32 sums. It wants s
    in x's dtype, which may not hold ``sqrt(D)``, so g carries that factor and s is 1.

    Returns:
        dx ``[..., D]`` in x's dtype.
    """
    if not x.numel():
        return torch.empty_like(x)  # the operation below divides by the number of rows
    root = math.sqrt(x.shape[-1])
    nothing = torch.zeros((), dtype=x.dtype, device=x.device)
    g = torch.addcmul(nothing, dy, weight, value=root).reshape(-1, x.shape[-1])  # [N, D]
    rows = x.reshape(g.shape).contiguous()
    norms = root / rstd.view(-1, 1)  # [N, 1]
    s = torch.ones(norms.shape, dtype=x.dtype, device=x.device)
    dx, _ = torch.ops.aten._weight_norm_interface_backward(g.contiguous(), rows, s, norms, 0)
    return dx.view(x.shape)
