"""Rotary position embedding in compiled C++."""

from torch import Tensor

from ..compiled import CompiledFunction

_forward = CompiledFunction("rotary_forward", "ppppiiiiid")


def rotary_forward(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> Tensor:
    """As the reference's, rounded once; cos and sin are float32."""
    if x.stride(2) != 1:
        x = x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    y = x.new_empty(x.shape)
    _forward(x.dtype, x, cos, sin, y, *x.shape, x.stride(0), x.stride(1), -1.0 if back else 1.0)
    return y
