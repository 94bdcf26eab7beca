"""Launchers of the mixture's fused Triton kernels, with the signatures of the plain PyTorch reference.

The products with D features, ``A x`` and its gradients, are one cuBLAS GEMM each over the stacks of both projections;
all that is as wide as F happens in three kernels, one forward and two backward.

Letters: N tokens of one adapter, D model, F ffn, E experts, K top-k, R rank, ER all experts' ranks.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ..registration import on_its_device
from . import plan
from .inputs import ExpertFactors, FfnGradients, FfnInputs
from .kernel_backward import token_gradients_kernel
from .kernel_forward import forward_kernel
from .kernel_tiles import spread_kernel
from .kernel_weights import weight_gradients_kernel


class _Launch:
    """What the launches of one call share: the variant, and the inputs laid out as the kernels read them."""

    def __init__(self, inputs: FfnInputs, a1: Tensor | None, a3: Tensor | None) -> None:
        self.num_experts, self.rank = _stack_shape(inputs)
        self.num_tokens, self.features = inputs.p1.shape
        self.top_k = inputs.experts.shape[1]
        self.sort_tokens = plan.prefers_sorted(self.num_tokens, self.num_experts, self.top_k, self.rank)
        self.dtype = inputs.p1.dtype
        p1, p3 = _rows(inputs.p1), _rows(inputs.p3)
        mask = _rows(inputs.h_mask) if inputs.h_mask is not None else None
        self.experts = inputs.experts.contiguous()
        self.operands: dict[str, Any] = {
            "p1": p1,
            "p3": p3,
            "h_mask": mask,
            "gates": inputs.gates.contiguous(),
            "experts": self.experts,
            "a1": a1,
            "a3": a3,
            "b1": _flat_b(inputs.gate, self.dtype) if inputs.gate else None,
            "b3": _flat_b(inputs.up, self.dtype) if inputs.up else None,
            "a2": inputs.down_a.to(self.dtype).contiguous() if inputs.down_a is not None else None,
            "stride_p1": p1.stride(0),
            "stride_p3": p3.stride(0),
            "stride_mask": mask.stride(0) if mask is not None else 0,
            "num_tokens": self.num_tokens,
            "scaling": inputs.scaling,
            "F": self.features,
            "K": self.top_k,
            "R": self.rank,
        }

    def empty(self, *shape: int) -> Tensor:
        """For partial sums."""
        return self.operands["p1"].new_empty(shape, dtype=torch.float32)

    def token_tiles(self) -> tuple[tuple[int, int, int], dict[str, Any]]:
        """Grid of the kernels over tokens, (tiles, ranges of features, blocks of columns), and its arguments."""
        width = (self.top_k if self.sort_tokens else self.num_experts) * self.rank
        blocks = plan.token_blocks(width, self.dtype)
        if self.sort_tokens:
            num_tiles = plan.most_tiles(self.num_tokens, self.num_experts, self.top_k, blocks.tokens)
            order, starts = plan.tiles_by_set(self.experts, self.num_experts, blocks.tokens)
        else:
            num_tiles = triton.cdiv(self.num_tokens, blocks.tokens)
            order, starts = None, None
        num_blocks = triton.cdiv(self.features, blocks.features)
        per_split = triton.cdiv(num_blocks, plan.feature_splits(num_tiles, num_blocks))
        grid = num_tiles, triton.cdiv(num_blocks, per_split), triton.cdiv(width, blocks.columns)
        tiling = {"order": order, "starts": starts, "blocks_per_split": per_split, "WIDTH": width}
        return grid, {**tiling, **blocks.as_arguments(self.top_k)}

    def weight_blocks(self) -> tuple[tuple[int, int, int], dict[str, Any]]:
        """Grid of the weight gradients, (blocks of features, ranges of tokens, groups), and its arguments."""
        width = self.rank if self.sort_tokens else self.num_experts * self.rank
        blocks = plan.weight_blocks(width, self.dtype)
        groups, mean_tokens = triton.cdiv(width, blocks.columns), self.num_tokens
        order, starts = None, None
        if self.sort_tokens:
            groups, mean_tokens = groups * self.num_experts, self.num_tokens * self.top_k // self.num_experts
            order, starts = plan.pairs_by_expert(self.experts, self.num_experts)
        num_blocks = triton.cdiv(self.features, blocks.features)
        splits = plan.token_splits(num_blocks * groups, triton.cdiv(mean_tokens, blocks.tokens))
        arguments = {"order": order, "starts": starts, "num_splits": splits, "WIDTH": width}
        return (num_blocks, splits, groups), {**arguments, **blocks.as_arguments(self.top_k)}

    def spread(self, partial: Tensor) -> Tensor:
        """Partial sums ``[stacks, splits, N, K, R]`` as ``[N, stacks * ER]``, zero outside the chosen experts."""
        stacks, splits = partial.shape[:2]
        width = self.num_experts * self.rank
        out = partial.new_empty((self.num_tokens, stacks * width), dtype=self.dtype)
        grid = triton.cdiv(self.num_tokens, 32), triton.cdiv(width, 64), stacks
        sizes = {"E": self.num_experts, "K": self.top_k, "R": self.rank, "BLOCK_N": 32, "BLOCK_C": 64}
        spread_kernel[grid](partial, self.experts, out, self.num_tokens, splits, **sizes)
        return out


@on_its_device
def mixlora_ffn_forward(inputs: FfnInputs) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Hidden features of the mixture, before the down projection.

    Args:
        inputs: on one device, p1 in float32, float16 or bfloat16; the projections alike in experts and rank.

    Returns:
        h ``[N, F]``; C ``[N, ER]`` (None without down experts); and for backward ``A1 x`` and ``A3 x`` of the chosen
        experts alone, ``[N, K*R]`` in the order of a token's slots.
    """
    a1, a3 = _lowered_inputs(inputs)
    launch = _Launch(inputs, a1, a3)
    grid, tiling = launch.token_tiles()
    hidden = inputs.p1.new_empty(inputs.p1.shape)
    has_down = inputs.down_a is not None
    partial = launch.empty(1, grid[1], launch.num_tokens, launch.top_k, launch.rank) if has_down else None
    forward_kernel[grid](hidden=hidden, lowered=partial, **launch.operands, **tiling)
    return hidden, launch.spread(partial) if partial is not None else None, a1, a3


@on_its_device
def mixlora_ffn_backward(
    inputs: FfnInputs, dhidden: Tensor, dlowered: Tensor | None, a1: Tensor | None, a3: Tensor | None
) -> FfnGradients:
    """Gradients of the forward, with every ``[N, F]`` intermediate computed again in registers.

    Args:
        inputs: the forward's.
        dhidden: gradient of h, ``W2^T dy``, ``[N, F]``.
        dlowered: gradient of C, ``s B2^T dy``, ``[N, ER]``; None without down experts.
        a1: from the forward; likewise a3.
    """
    launch = _Launch(inputs, a1, a3)
    if dlowered is None:  # nothing came of C
        launch.operands["a2"] = None
    dhidden = _rows(dhidden)
    operands = {
        **launch.operands,
        "dhidden": dhidden,
        "stride_dh": dhidden.stride(0),
        "dlowered": dlowered.contiguous() if dlowered is not None else None,
        "E": launch.num_experts,
    }
    dp1, dp3, dgates, da = _token_gradients(launch, operands)
    db1, db3, da2 = _weight_gradients(launch, operands)

    stacks = _stacks(inputs)
    dx, d_lora_a = None, []
    if da is not None:
        dx = da @ _flat_a(stacks, launch.dtype)
        d_lora_a = [
            part.view(launch.num_experts, launch.rank, -1) for part in (da.T @ inputs.masked_x).chunk(len(stacks))
        ]
        if inputs.x_mask is not None:
            dx.mul_(inputs.x_mask)
    # an op's outputs share no memory, which parts of one product would
    d_stacks = [
        (torch.empty_like(stack.lora_a).copy_(d_a), torch.empty_like(stack.lora_b).copy_(d_b.transpose(1, 2)))
        for stack, d_a, d_b in zip(stacks, d_lora_a, [d_b for d_b in (db1, db3) if d_b is not None], strict=True)
    ]
    return FfnGradients(
        dx=dx,
        dp1=dp1,
        dp3=dp3,
        dgates=dgates.to(inputs.gates.dtype),
        gate=d_stacks[0] if inputs.gate else None,
        up=d_stacks[-1] if inputs.up else None,
        down_a=da2.to(inputs.down_a.dtype) if da2 is not None and inputs.down_a is not None else None,
    )


def _token_gradients(launch: _Launch, operands: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dp1 and dp3 ``[N, F]``, dgates ``[N, K]`` in float32, and those of da1 and da3 there are, side by side."""
    grid, tiling = launch.token_tiles()
    dp1, dp3 = (operands[name].new_empty(launch.num_tokens, launch.features) for name in ("p1", "p3"))
    names = [name for name in ("a1", "a3") if operands[name] is not None]
    partial = launch.empty(len(names), grid[1], launch.num_tokens, launch.top_k, launch.rank)
    parts = dict(zip(names, partial, strict=True))
    dgates = launch.empty(grid[1], launch.num_tokens, launch.top_k)
    token_gradients_kernel[grid](
        dp1=dp1,
        dp3=dp3,
        da1=parts.get("a1"),
        da3=parts.get("a3"),
        dgates=dgates,
        BLOCK_K=triton.next_power_of_2(launch.top_k),
        **operands,
        **tiling,
    )
    return dp1, dp3, dgates.sum(dim=0), launch.spread(partial) if names else None


def _weight_gradients(launch: _Launch, operands: dict[str, Any]) -> list[Tensor | None]:
    """db1, db3 and da2, each ``[E, R, F]`` in float32, or None."""
    grid, tiling = launch.weight_blocks()
    shape = grid[1], launch.num_experts, launch.rank, launch.features
    partial = [launch.empty(*shape) if operands[name] is not None else None for name in ("a1", "a3", "a2")]
    weight_gradients_kernel[grid](db1=partial[0], db3=partial[1], da2=partial[2], **operands, **tiling)
    return [None if part is None else part[0] if len(part) == 1 else part.sum(dim=0) for part in partial]


def _lowered_inputs(inputs: FfnInputs) -> tuple[Tensor | None, Tensor | None]:
    """``A1 x`` and ``A3 x`` of the chosen experts, ``[N, K*R]``, from one product over both stacks."""
    stacks = _stacks(inputs)
    if not stacks:
        return None, None
    num_tokens, top_k = inputs.experts.shape
    num_experts, rank = stacks[0].lora_a.shape[:2]
    wide = inputs.masked_x @ _flat_a(stacks, inputs.p1.dtype).T  # [N, stacks * ER]
    wide = wide.view(num_tokens, len(stacks), num_experts, rank)
    index = inputs.experts[:, :, None].expand(num_tokens, top_k, rank)
    found = [wide[:, stack].gather(1, index).view(num_tokens, top_k * rank) for stack in range(len(stacks))]
    return found[0] if inputs.gate else None, found[-1] if inputs.up else None


def _stacks(inputs: FfnInputs) -> list[ExpertFactors]:
    return [stack for stack in (inputs.gate, inputs.up) if stack is not None]


def _flat_a(stacks: Sequence[ExpertFactors], dtype: torch.dtype) -> Tensor:
    """A of all experts of all stacks, ``[stacks * ER, D]``."""
    return torch.cat([stack.lora_a.flatten(0, 1) for stack in stacks]).to(dtype)


def _flat_b(stack: ExpertFactors, dtype: torch.dtype) -> Tensor:
    """Transposed B of all experts, ``[E, R, F]``."""
    transposed = stack.lora_b.transpose(1, 2)
    return torch.empty(transposed.shape, dtype=dtype, device=transposed.device).copy_(transposed)


def _stack_shape(inputs: FfnInputs) -> tuple[int, int]:
    """(E, R), which all projections share."""
    stacks = [*(stack.lora_a for stack in _stacks(inputs)), *([inputs.down_a] if inputs.down_a is not None else [])]
    shapes = {tuple(stack.shape[:2]) for stack in stacks}
    if len(shapes) != 1:
        raise ValueError(f"lora_a of the projections' experts have (experts, rank) {sorted(shapes)}; they must agree")
    num_experts, rank = shapes.pop()
    return num_experts, rank


def _rows(tensor: Tensor) -> Tensor:
    """The tensor with each row's features side by side; rows may lie apart."""
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()
