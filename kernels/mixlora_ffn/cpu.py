"""The mixture of LoRA experts in a SwiGLU layer, with compiled C++ for all that is F wide.

Letters: T tokens, P parts, D model, F ffn, E experts, K top-k, R rank, S projections among gate and up with experts.
"""

from array import array

import torch
from torch import Tensor

from ..compiled import CompiledFunction
from .inputs import FfnGroup, GroupGradients
from .model_products import input_gradients, lowered_inputs
from .reference import factor_gradients

_GROUP = "ppppppppiiiiii"
_forward = CompiledFunction("mixlora_ffn_forward", _GROUP + "pp")
_backward = CompiledFunction("mixlora_ffn_backward", _GROUP + "ppppppppp")


def group_forward(group: FfnGroup) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """As the reference's, with every sum in float32."""
    a1, a3 = lowered_inputs(group)
    inputs = _Inputs(group, a1, a3)
    hidden = torch.empty_like(inputs.p1)
    lowered = hidden.new_empty(inputs.all_ranks) if group.parts[0].down_a is not None else None
    _forward(hidden.dtype, *inputs.arguments, hidden, lowered)
    return hidden, lowered, a1, a3


def group_backward(
    group: FfnGroup, dhidden: Tensor, dlowered: Tensor | None, a1: Tensor | None, a3: Tensor | None
) -> GroupGradients:
    """As the reference's, with every sum in float32 and each intermediate of a chunk of features in a core's cache."""
    has_down = dlowered is not None and group.parts[0].down_a is not None
    inputs = _Inputs(group, a1, a3, has_down)
    tokens, all_ranks = inputs.all_ranks
    dp1, dp3 = torch.empty_like(inputs.p1), torch.empty_like(inputs.p1)
    da = dp1.new_empty(tokens, len(group.parts[0].reading_x) * all_ranks)
    dgates = dp1.new_empty(group.gates.shape, dtype=torch.float32)
    stacks, features = (len(group.parts), group.num_experts), dp1.shape[1]
    of_b, of_a = (*stacks, features, group.rank), (*stacks, group.rank, features)
    db1, db3, d_down_a = (
        dp1.new_empty(shape, dtype=torch.float32) if is_there else None
        for shape, is_there in ((of_b, a1 is not None), (of_b, a3 is not None), (of_a, has_down))
    )
    upstream = dhidden.contiguous(), dlowered.contiguous() if dlowered is not None else None
    _backward(dp1.dtype, *inputs.arguments, *upstream, dp1, dp3, dgates, da, db1, db3, d_down_a)
    dx, d_flat_a = input_gradients(group, da)
    factors = factor_gradients(group, d_flat_a, db1, db3, d_down_a)
    return GroupGradients(dx, dp1, dp3, dgates.to(group.gates.dtype), factors)


class _Inputs:
    """A group as the C++ reads it.

    Attributes:
        p1: contiguous, ``[T, F]``.
        all_ranks: T and ER.
        arguments: what describes the group.
    """

    def __init__(self, group: FfnGroup, a1: Tensor | None, a3: Tensor | None, has_down: bool = True) -> None:
        self.p1 = group.p1.contiguous()
        self.all_ranks = self.p1.shape[0], group.num_experts * group.rank
        if group.experts.numel() and not 0 <= group.experts.min() <= group.experts.max() < group.num_experts:
            raise IndexError(f"experts must be in 0..E-1={group.num_experts - 1}")
        described = array("q")
        self._alive: list[Tensor | None] = []  # what only addresses speak of
        for part in group.parts:
            factors = (
                part.gate.lora_b if part.gate else None,
                part.up.lora_b if part.up else None,
                part.down_a if has_down else None,
            )
            own = [None if factor is None else factor.to(torch.float32).contiguous() for factor in factors]
            own.append(None if part.h_mask is None else part.h_mask.to(self.p1.dtype).contiguous())
            self._alive += own
            described.extend([part.length, *(0 if tensor is None else tensor.data_ptr() for tensor in own)])
        scalings = array("f", [part.scaling for part in group.parts])
        sizes = len(group.parts), group.num_experts, group.experts.shape[1], group.rank
        self.arguments = (
            *(self.p1, group.p3.contiguous()),
            *(None if a is None else a.contiguous() for a in (a1, a3)),
            *(group.gates.to(torch.float32).contiguous(), group.experts.to(torch.int64).contiguous()),
            *(described, scalings, *self.p1.shape, *sizes),
        )
