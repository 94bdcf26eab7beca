"""Frozen projections of one input plus per-range LoRA, the low-rank part in compiled C++.

Letters: T tokens, I input features, O output features, R rank, n tokens of one range.
"""

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from ..compiled import CompiledFunction
from ..products import linear, summed_matmuls
from .ranges import Factors, Gradients, LoraRange

_forward = CompiledFunction("lora_linear_forward", "pppppiii")
_backward = CompiledFunction("lora_linear_backward", "pppppppiii")


def lora_linear_forward(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], ranges: Sequence[LoraRange]
) -> tuple[list[Tensor], list[Tensor]]:
    """As the reference's, with all sums in float32; factors are rounded as ``lanes.h`` says."""
    outputs = [linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    x = x.contiguous()
    lowered = [x.new_empty(part.end - part.start, sum(part.ranks)) for part in ranges]
    table = _Table(ranges, lowered, x.dtype)
    _forward(
        *(x.dtype, x, _addresses(outputs), _widths(weights), table.addresses, table.scalings),
        *(x.shape[1], len(ranges), len(weights)),
    )
    return outputs, lowered


def lora_linear_backward(
    d_outputs: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    ranges: Sequence[LoraRange],
    lowered: Sequence[Tensor],
    needs_dx: bool,
) -> tuple[Tensor | None, Gradients]:
    """As the reference's, with every row of x and of the outputs' gradients read once for all factors."""
    dx = summed_matmuls(d_outputs, weights) if needs_dx else None
    x, d_outputs = x.contiguous(), [dy.contiguous() for dy in d_outputs]
    table = _Table(ranges, lowered, x.dtype)
    found = [[None if pair is None else _like(pair) for pair in part.factors] for part in ranges]
    flat = [grad for own in found for pair in own for grad in (pair or (None, None))]
    _backward(
        *(x.dtype, x, _addresses(d_outputs), _widths(weights), table.addresses, table.scalings),
        *(dx, _addresses(flat), x.shape[1], len(ranges), len(weights)),
    )
    return dx, [
        [
            None if pair is None or grads is None else (grads[0].to(pair[0].dtype), grads[1].to(pair[1].dtype))
            for pair, grads in zip(part.factors, own, strict=True)
        ]
        for part, own in zip(ranges, found, strict=True)
    ]


class _Table:
    """The ranges as the C++ reads them; it keeps alive what the addresses name."""

    def __init__(self, ranges: Sequence[LoraRange], lowered: Sequence[Tensor], dtype: torch.dtype) -> None:
        self._kept: list[Tensor] = []
        numbers: list[int] = []
        for part, own in zip(ranges, lowered, strict=True):
            mask = None if part.mask is None else part.mask.to(dtype)
            numbers += (part.start, part.end - part.start, self._address(mask), self._address(own))
            for pair in part.factors:
                if pair is None:
                    numbers += (0, 0, 0)
                else:
                    numbers += (*(self._address(factor.float()) for factor in pair), pair[0].shape[0])
        self.addresses = array("q", numbers)
        self.scalings = array("d", [scaling for part in ranges for scaling in part.scalings])

    def _address(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        self._kept.append(tensor.detach().contiguous())
        return self._kept[-1].data_ptr()


def _addresses(tensors: Sequence[Tensor | None]) -> "array[int]":
    return array("q", [0 if tensor is None else tensor.data_ptr() for tensor in tensors])


def _widths(weights: Sequence[Tensor]) -> "array[int]":
    return array("q", [weight.shape[0] for weight in weights])


def _like(pair: Factors) -> Factors:
    """Room for the gradients of a pair, in float32."""
    lora_a, lora_b = pair
    return lora_a.new_empty(lora_a.shape, dtype=torch.float32), lora_b.new_empty(lora_b.shape, dtype=torch.float32)
