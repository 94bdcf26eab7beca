"""Writes safetensors files one tensor at a time, so that no more than one is in memory.

Format: https://github.com/huggingface/safetensors#format. The library's own writer takes all tensors at once.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_CODES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_ALIGNMENT = 8


@dataclass(frozen=True, kw_only=True)
class TensorPlan:
    """A tensor to be written.

    Args:
        name: in the file.
        shape: as torch has it.
        dtype: of its values in the file.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Of its data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_safetensors(
    path: Path, plans: Sequence[TensorPlan], tensors: Iterable[Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a file of these tensors, each taken and let go before the next is asked for.

    Args:
        plans: what will be written, in the order of the data.
        tensors: one a plan, of its shape and dtype, on any device.
        metadata: strings for the file's header.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    position = 0
    for plan in plans:
        end = position + plan.num_bytes
        header[plan.name] = {
            "dtype": _CODES[plan.dtype],
            "shape": list(plan.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for plan, tensor in zip(plans, tensors, strict=True):
            assert (tuple(tensor.shape), tensor.dtype) == (plan.shape, plan.dtype), plan.name
            file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
