"""The gated product ``silu(gate) * up`` in plain PyTorch, forward and backward.

Letters: F ffn, ... any leading shape.
"""

import torch
from torch import Tensor


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``, ``[..., F]``.

    Args:
        gate: ``[..., F]``.
        up: ``[..., F]`` in gate's dtype.
    """
    return torch.nn.functional.silu(gate.contiguous()).mul_(up)


def swiglu_backward(dh: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``h = silu(gate) * up`` with respect to gate and up, both ``[..., F]``.

    Args:
        dh: ``[..., F]``.
        gate: ``[..., F]``.
        up: ``[..., F]``.
    """
    gate = gate.contiguous()
    dup = torch.nn.functional.silu(gate).mul_(dh)
    # Element by element it may write over what it reads, which saves a buffer of gate's size.
    dgate = torch.empty_like(gate)
    torch.mul(dh, up, out=dgate)
    torch.ops.aten.silu_backward.grad_input(dgate, gate, grad_input=dgate)
    return dgate, dup
