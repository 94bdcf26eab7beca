"""The gated product ``silu(gate) * up`` in Triton, forward and backward.

Letters: F ffn, ... any leading shape.
"""

# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..registration import on_its_device

BLOCK = 1024


@triton.jit
def _wide(x):
    return x if x.dtype == tl.float64 else x.to(tl.float32)


@triton.jit
def _forward(gate_ptr, up_ptr, h_ptr, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < size
    gate = _wide(tl.load(gate_ptr + offsets, mask=inside, other=0.0))
    up = _wide(tl.load(up_ptr + offsets, mask=inside, other=0.0))
    h = gate * tl.sigmoid(gate) * up
    tl.store(h_ptr + offsets, h.to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(dh_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < size
    dh = _wide(tl.load(dh_ptr + offsets, mask=inside, other=0.0))
    gate = _wide(tl.load(gate_ptr + offsets, mask=inside, other=0.0))
    up = _wide(tl.load(up_ptr + offsets, mask=inside, other=0.0))
    sigmoid = tl.sigmoid(gate)
    dgate = dh * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(dgate_ptr + offsets, dgate.to(dgate_ptr.dtype.element_ty), mask=inside)
    tl.store(dup_ptr + offsets, (dh * gate * sigmoid).to(dup_ptr.dtype.element_ty), mask=inside)


@on_its_device
def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """As the reference's, with one rounding."""
    gate, up = gate.contiguous(), up.contiguous()
    h = torch.empty_like(gate)
    if gate.numel():
        _forward[(triton.cdiv(gate.numel(), BLOCK),)](gate, up, h, gate.numel(), BLOCK=BLOCK)
    return h


@on_its_device
def swiglu_backward(dh: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """As the reference's, with every tensor read once."""
    dh, gate, up = dh.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup = torch.empty_like(gate), torch.empty_like(gate)
    if gate.numel():
        _backward[(triton.cdiv(gate.numel(), BLOCK),)](dh, gate, up, dgate, dup, gate.numel(), BLOCK=BLOCK)
    return dgate, dup
