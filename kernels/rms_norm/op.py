"""Autograd for the root-mean-square normalisation."""

import torch
from torch import Tensor

from ..compiled import runs_compiled
from ..registration import Differentiable, Operator, runs_kernel
from . import cpu, reference


def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if runs_kernel(x):
        from .kernel import rms_norm_forward

        return rms_norm_forward(x, weight, eps)
    if runs_compiled(x):
        return cpu.rms_norm_forward(x, weight, eps)
    return reference.rms_norm_forward(x, weight, eps)


def _forward_fake(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 1), dtype=wide)


def _backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    if runs_kernel(x):
        from .kernel import rms_norm_backward

        return rms_norm_backward(dy, x, weight, rstd)
    if runs_compiled(x):
        return cpu.rms_norm_backward(dy, x, weight, rstd)
    return reference.rms_norm_backward(dy, x, weight, rstd)


def scaled(x: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    """The forward's y once more, to the bit where the same code computes it."""
    return (cpu if runs_compiled(x) else reference).scaled(x, rstd, weight)


_rms_norm = Differentiable(
    Operator("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)", _forward, _forward_fake),
    Operator(
        "rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd) -> Tensor",
        _backward,
        fake=lambda dy, x, weight, rstd: x.new_empty(x.shape),
    ),
    num_differentiated=1,
    save=lambda arguments, results: [*arguments[:2], results[1]],
    differentiate=lambda backward, kept, needs, grads: [backward(grads[0], *kept)],
    constants=(1,),
)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Root-mean-square normalisation (https://arxiv.org/abs/1910.07467), statistics in at least float32.

    Args:
        x: ``[..., D]``.
        weight: frozen ``[D]`` in x's dtype; no gradient is computed for it.
        eps: added to the mean square.

    Returns:
        ``weight * (x * rstd)`` ``[..., D]`` in x's dtype, and ``rstd`` ``[..., 1]`` (float64 for a float64 x, else
        float32), through which nothing is differentiated.

    Raises:
        ValueError: when the weight is not ``[D]`` or of another dtype than x.
    """
    if weight.shape != x.shape[-1:] or weight.dtype != x.dtype:
        raise ValueError(
            f"weight {list(weight.shape)} of {weight.dtype} must be [{x.shape[-1]}] of x's dtype, {x.dtype}"
        )
    result: tuple[Tensor, Tensor] = _rms_norm(x, weight, eps)
    return result
