"""What the mixture of LoRA experts in a SwiGLU layer is computed from: one adapter's inputs, and several adapters'.

Letters: T tokens of a group, N tokens of one adapter, D model, F ffn, E experts, K top-k, R rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ExpertFactors:
    """Stacked LoRA factors of the experts on one projection.

    Args:
        lora_a: ``[E, R, in]``.
        lora_b: ``[E, out, R]``.
    """

    lora_a: Tensor
    lora_b: Tensor


@dataclass(frozen=True)
class FfnInputs:
    """What the mixture is computed from.

    Args:
        x: ``[N, D]``.
        p1: ``W1 x``, ``[N, F]``.
        p3: ``W3 x``, ``[N, F]``.
        gates: routing weights ``[N, K]``.
        experts: selected experts ``[N, K]``, distinct in a row.
        gate: factors of the gate projection's experts, or None.
        up: factors of the up projection's experts, or None.
        down_a: A of the down projection's experts, ``[E, R, F]``, or None.
        scaling: s.
        x_mask: dropout mask of the experts' input ``[N, D]``, or None.
        h_mask: dropout mask of the down experts' input ``[N, F]``, or None.
    """

    x: Tensor
    p1: Tensor
    p3: Tensor
    gates: Tensor
    experts: Tensor
    gate: ExpertFactors | None
    up: ExpertFactors | None
    down_a: Tensor | None
    scaling: float
    x_mask: Tensor | None
    h_mask: Tensor | None

    @property
    def masked_x(self) -> Tensor:
        """What the gate and up experts read."""
        return self.x if self.x_mask is None else self.x * self.x_mask


@dataclass(frozen=True)
class FfnGradients:
    """What the backward returns, in the order of the forward's arguments; None where there is no such input."""

    dx: Tensor | None
    dp1: Tensor
    dp3: Tensor
    dgates: Tensor
    gate: tuple[Tensor, Tensor] | None
    up: tuple[Tensor, Tensor] | None
    down_a: Tensor | None


@dataclass(frozen=True)
class FfnPart:
    """One adapter's share of a group: how many tokens are its own, and the rest of ``FfnInputs``.

    Args:
        length: N.
        gate: as in ``FfnInputs``, and so is all that follows.
        up: see gate.
        down_a: see gate.
        scaling: see gate.
        x_mask: see gate.
        h_mask: see gate.
    """

    length: int
    gate: ExpertFactors | None
    up: ExpertFactors | None
    down_a: Tensor | None
    scaling: float
    x_mask: Tensor | None = None
    h_mask: Tensor | None = None

    @property
    def reading_x(self) -> list[ExpertFactors]:
        """The stacks whose A reads x."""
        return [stack for stack in (self.gate, self.up) if stack is not None]


@dataclass(frozen=True)
class FfnGroup:
    """The inputs of several adapters that agree in E, R, K and the projections that have experts.

    Args:
        x: ``[T, D]``, the parts' tokens one after the other, as in all that follows.
        p1: ``[T, F]``.
        p3: ``[T, F]``.
        gates: ``[T, K]``.
        experts: ``[T, K]``, each token's among its own adapter's.
        parts: the adapters.
    """

    x: Tensor
    p1: Tensor
    p3: Tensor
    gates: Tensor
    experts: Tensor
    parts: Sequence[FfnPart]

    @staticmethod
    def of_one(inputs: FfnInputs) -> "FfnGroup":
        """A group of one adapter."""
        factors = inputs.gate, inputs.up, inputs.down_a, inputs.scaling, inputs.x_mask, inputs.h_mask
        part = FfnPart(inputs.p1.shape[0], *factors)
        return FfnGroup(inputs.x, inputs.p1, inputs.p3, inputs.gates, inputs.experts, (part,))

    def one_by_one(self) -> list[FfnInputs]:
        """Each adapter's own inputs."""
        rows = (t.split(self.lengths) for t in (self.x, self.p1, self.p3, self.gates, self.experts))
        return [
            FfnInputs(x, p1, p3, gates, experts, p.gate, p.up, p.down_a, p.scaling, p.x_mask, p.h_mask)
            for p, x, p1, p3, gates, experts in zip(self.parts, *rows, strict=True)
        ]

    @property
    def lengths(self) -> list[int]:
        """The parts' N."""
        return [part.length for part in self.parts]

    @property
    def num_experts(self) -> int:
        """E."""
        return self._one_stack.shape[0]

    @property
    def rank(self) -> int:
        """R."""
        return self._one_stack.shape[1]

    @property
    def _one_stack(self) -> Tensor:
        part = self.parts[0]
        stacks = [part.down_a, *(stack.lora_a for stack in part.reading_x)]
        return next(stack for stack in stacks if stack is not None)

    @property
    def masked_x(self) -> Tensor:
        """What the gate and up experts read."""
        mask = self._joined([part.x_mask for part in self.parts], self.x)
        return self.x if mask is None else self.x * mask

    @property
    def x_mask(self) -> Tensor | None:
        """All rows' mask of x."""
        return self._joined([part.x_mask for part in self.parts], self.x)

    @property
    def h_mask(self) -> Tensor | None:
        """All rows' mask of h."""
        return self._joined([part.h_mask for part in self.parts], self.p1)

    def _joined(self, masks: list[Tensor | None], like: Tensor) -> Tensor | None:
        """The parts' masks below each other, ones for a part without."""
        if all(mask is None for mask in masks):
            return None
        if len(masks) == 1:
            return masks[0]
        found = zip(masks, self.lengths, strict=True)
        return torch.cat([like.new_ones(n, like.shape[1]) if mask is None else mask for mask, n in found])


@dataclass(frozen=True)
class FactorGradients:
    """Of one part's factors; None where there is no such factor."""

    gate: tuple[Tensor, Tensor] | None
    up: tuple[Tensor, Tensor] | None
    down_a: Tensor | None


@dataclass(frozen=True)
class GroupGradients:
    """Of a group's tensors, and of each part's factors."""

    dx: Tensor | None
    dp1: Tensor
    dp3: Tensor
    dgates: Tensor
    parts: Sequence[FactorGradients]


def check_group(group: FfnGroup, downs: Sequence[ExpertFactors]) -> None:
    """Refuse tensors that do not fit each other: compiled code reads what their shapes promise.

    Raises:
        ValueError: naming the tensor, what it is and what it must be.
    """
    (tokens, features), model, top_k = group.p1.shape, group.x.shape[-1], group.experts.shape[-1]
    stack = group.num_experts, group.rank
    rows: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
        ("x", group.x, (tokens, model)),
        ("p3", group.p3, (tokens, features)),
        ("gates", group.gates, (tokens, top_k)),
        ("experts", group.experts, (tokens, top_k)),
    ]
    for part in group.parts:
        rows += [("x_mask", part.x_mask, (part.length, model)), ("h_mask", part.h_mask, (part.length, features))]
        for name, pair in (("gate", part.gate), ("up", part.up)):
            if pair is not None:
                rows += [(f"{name}.lora_a", pair.lora_a, (*stack, model))]
                rows += [(f"{name}.lora_b", pair.lora_b, (stack[0], features, stack[1]))]
        rows.append(("down.lora_a", part.down_a, (*stack, features)))
    rows += [("down.lora_b", down.lora_b, (stack[0], model, stack[1])) for down in downs]
    for name, tensor, shape in rows:
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} {list(tensor.shape)} must be {list(shape)}, as the other tensors are")
    for name, tensor in (("x", group.x), ("p3", group.p3)):
        if tensor.dtype != group.p1.dtype:
            raise ValueError(f"{name} of {tensor.dtype} must be of the dtype of p1, {group.p1.dtype}")
    if sum(group.lengths) != tokens:
        raise ValueError(f"the parts' lengths {group.lengths} must add up to the {tokens} tokens")
