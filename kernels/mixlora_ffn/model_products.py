"""The products over D of the mixture of LoRA experts, in plain PyTorch.

Letters: T tokens, P parts, D model, E experts, R rank, ER all of an adapter's experts' ranks side by side, S
projections among gate and up that have experts.
"""

import torch
from torch import Tensor

from ..parts import columns_by_part, times, transposed_times
from .inputs import FfnGroup


def lowered_inputs(group: FfnGroup) -> tuple[Tensor | None, Tensor | None]:
    """``A1 x`` and ``A3 x`` of all experts, ``[T, ER]`` each; None without experts on the projection."""
    num_stacks = len(group.parts[0].reading_x)
    if not num_stacks:
        return None, None
    lowered_x = times(group.masked_x, _side_by_side(group).transpose(1, 2), group.lengths)  # [T, S*ER]
    chunks = [chunk.clone(memory_format=torch.contiguous_format) for chunk in lowered_x.chunk(num_stacks, dim=1)]
    return chunks[0] if group.parts[0].gate else None, chunks[-1] if group.parts[0].up else None


def input_gradients(group: FfnGroup, da: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and of the A that read it, ``[T, D]`` and ``[P, S*ER, D]``; None when none does.

    Args:
        da: gradient of ``A1 x`` and ``A3 x`` side by side, those of them that there are, ``[T, S*ER]``.
    """
    if not group.parts[0].reading_x:
        return None, None
    dx = times(da, _side_by_side(group), group.lengths)
    if (x_mask := group.x_mask) is not None:
        dx.mul_(x_mask)
    return dx, transposed_times(columns_by_part(da, None, da.shape[1], group.lengths), group.masked_x, group.lengths)


def _side_by_side(group: FfnGroup) -> Tensor:
    """A of the experts of all stacks that read x, ``[P, S*ER, D]``."""
    stacks = [stack.lora_a for part in group.parts for stack in part.reading_x]
    return joined(stacks, group.p1.dtype).view(len(group.parts), -1, group.x.shape[1])


def joined(stacks: list[Tensor], dtype: torch.dtype) -> Tensor:
    """``[E, R, in]`` below each other in a dtype, ``[stacks * ER, in]``."""
    if len(stacks) == 1:
        return stacks[0].to(dtype).flatten(0, 1)
    return torch.cat([stack.flatten(0, 1) for stack in stacks]).to(dtype)
