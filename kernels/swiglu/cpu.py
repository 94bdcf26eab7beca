"""The gated product ``silu(gate) * up`` in compiled C++."""

import torch
from torch import Tensor

from ..compiled import CompiledFunction

_forward = CompiledFunction("swiglu_forward", "pppi")
_backward = CompiledFunction("swiglu_backward", "pppppi")


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """As the reference's, with one rounding."""
    gate, up = gate.contiguous(), up.contiguous()
    h = torch.empty_like(gate)
    _forward(gate.dtype, gate, up, h, gate.numel())
    return h


def swiglu_backward(dh: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """As the reference's, with every tensor read once."""
    dh, gate, up = dh.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup = torch.empty_like(gate), torch.empty_like(gate)
    _backward(gate.dtype, dh, gate, up, dgate, dup, gate.numel())
    return dgate, dup
