"""Autograd for the rotary position embedding."""

import torch
from torch import Tensor

from ..compiled import runs_compiled
from ..registration import Differentiable, Operator, runs_kernel
from . import cpu, reference


def _run(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    if runs_kernel(x):
        from .kernel import rotary_forward

        return rotary_forward(x, cos, sin, back=back)
    if runs_compiled(x) and cos.dtype == torch.float32:
        return cpu.rotary_forward(x, cos, sin, back=back)
    return reference.rotary_forward(x, cos, sin, back=back)


_turn = Operator(
    "rotary(Tensor x, Tensor cos, Tensor sin, bool back) -> Tensor",
    _run,
    fake=lambda x, cos, sin, back: x.new_empty(x.shape),
)
# A rotation's transpose is the rotation by the opposite angle: the backward is the operator itself.
_rotary = Differentiable(
    _turn,
    _turn,
    num_differentiated=1,
    save=lambda arguments, results: [*arguments[1:3], not arguments[3]],
    differentiate=lambda backward, kept, needs, grads: [backward(grads[0], *kept)],
)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (https://arxiv.org/abs/2104.09864) of the feature pairs ``(i, i + d/2)``.

    Args:
        x: queries or keys ``[T, H, d]``, of any strides.
        cos: ``[T, 1, d]``, float32 (float64 for a float64 x), its two halves equal; no gradient is computed for it.
        sin: as cos.

    Returns:
        ``[T, H, d]`` in x's dtype, contiguous; the arithmetic runs in cos's dtype and is rounded once.

    Raises:
        ValueError: when d is odd or a table is not ``[T, 1, d]``.
    """
    tokens, _, size = x.shape
    if size % 2:
        raise ValueError(f"d={size} must be even: features turn in pairs")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape != (tokens, 1, size):
            raise ValueError(f"{name} {list(table.shape)} must be [T, 1, d] = [{tokens}, 1, {size}]")
    result: Tensor = _rotary(x, cos, sin, False)
    return result
