"""Autograd for the gated product of a feed-forward layer."""

from torch import Tensor

from ..compiled import runs_compiled
from ..registration import Differentiable, Operator, runs_kernel
from . import cpu, reference


def _forward(gate: Tensor, up: Tensor) -> Tensor:
    if runs_kernel(gate):
        from .kernel import swiglu_forward

        return swiglu_forward(gate, up)
    if runs_compiled(gate):
        return cpu.swiglu_forward(gate, up)
    return reference.swiglu_forward(gate, up)


def _backward(dh: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    if runs_kernel(gate):
        from .kernel import swiglu_backward

        return swiglu_backward(dh, gate, up)
    if runs_compiled(gate):
        return cpu.swiglu_backward(dh, gate, up)
    return reference.swiglu_backward(dh, gate, up)


_swiglu = Differentiable(
    Operator(
        "swiglu(Tensor gate, Tensor up) -> Tensor",
        _forward,
        fake=lambda gate, up: gate.new_empty(gate.shape),
    ),
    Operator(
        "swiglu_backward(Tensor dh, Tensor gate, Tensor up) -> (Tensor, Tensor)",
        _backward,
        fake=lambda dh, gate, up: (gate.new_empty(gate.shape), gate.new_empty(gate.shape)),
    ),
    num_differentiated=2,
    save=lambda arguments, results: arguments,
    differentiate=lambda backward, kept, needs, grads: backward(*grads, *kept),
)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` (https://arxiv.org/abs/2002.05202), of which the backward keeps only gate and up.

    Args:
        gate: ``[..., F]``.
        up: ``[..., F]`` in gate's dtype.

    Returns:
        ``[..., F]`` in gate's dtype.

    Raises:
        ValueError: when gate and up differ in shape or dtype.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"up {list(up.shape)} of {up.dtype} must be of gate's shape and dtype, {list(gate.shape)} of {gate.dtype}"
        )
    result: Tensor = _swiglu(gate, up)
    return result
