"""The mixture of LoRA experts in a SwiGLU layer, in compiled C++.

Letters: T tokens, P parts, D model, F ffn, E experts, K top-k, R rank, S projections among gate and up with experts.
"""

from array import array

import torch
from torch import Tensor

from ..compiled import CompiledFunction
from .cpu_model import ModelPart, ModelProducts
from .inputs import FfnGroup, GroupGradients
from .reference import factor_gradients

_GROUP = "ppppppppiiiiii"
_forward = CompiledFunction("mixlora_ffn_forward", _GROUP + "pp")
_backward = CompiledFunction("mixlora_ffn_backward", _GROUP + "ppppppppp")


def group_forward(group: FfnGroup) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """As the reference's, with every sum in float32."""
    products = _products(group)
    lowered_x = products.lower(group.x) if products else [None]
    a1 = lowered_x[0] if group.parts[0].gate else None
    a3 = lowered_x[-1] if group.parts[0].up else None
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
    products = _products(group)
    dx = products.raise_(da) if products else None
    d_flat_a = products.outer(da, group.x).flatten(1, 3) if products else None
    factors = factor_gradients(group, d_flat_a, db1, db3, d_down_a)
    return GroupGradients(dx, dp1, dp3, dgates.to(group.gates.dtype), factors)


def _products(group: FfnGroup) -> ModelProducts | None:
    """Those over D of the experts that read x; None when none does."""
    if not group.parts[0].reading_x:
        return None
    parts = [ModelPart(part.length, [stack.lora_a for stack in part.reading_x], part.x_mask) for part in group.parts]
    return ModelProducts(group.experts, parts, group.p1.dtype)


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
