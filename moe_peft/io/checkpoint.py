"""What the loader needs from a file format: names, shapes, and a way to copy one tensor."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from moe_peft.model.config import LlamaConfig

_MAX_LISTED = 4


class Checkpoint(Protocol):
    """An open base model on disk; tensors go by their names in the file."""

    @property
    def path(self) -> Path:
        """The folder or file, for messages."""

    @property
    def config(self) -> LlamaConfig:
        """The model's shape."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the weights are stored in, or, of a quantized file, are best computed in."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The tensors that a model takes, with their shapes in torch's order."""

    def name_of(self, parameter_name: str) -> str:
        """The file's name of one of our parameters."""

    def copy_into(self, name: str, target: Tensor) -> None:
        """Fill ``target``, which has the tensor's shape, converting to its dtype and device."""


def check_shapes(path: Path, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    """Compare the tensors of a file with those of the model.

    Raises:
        ValueError: naming tensors that are missing, that nothing takes, or whose shape differs.
    """
    missing = [name for name in expected if name not in found]
    if missing:
        raise ValueError(f"{path} lacks {_listed(missing, 'tensor')}")
    unexpected = [name for name in found if name not in expected]
    if unexpected:
        raise ValueError(f"{path} has {_listed(unexpected, 'tensor')} that this architecture does not take")
    wrong = [
        f"{name} has shape {list(found[name])} where the config says {list(shape)}"
        for name, shape in expected.items()
        if found[name] != shape
    ]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ValueError(f"{path}: {wrong[0]}{more}")


def most_common_dtype(num_values: Mapping[torch.dtype, int]) -> torch.dtype:
    """The dtype that most of a file's values have; float32 of a file without any."""
    return max(num_values, key=lambda dtype: num_values[dtype]) if num_values else torch.float32


def _listed(names: list[str], noun: str) -> str:
    shown = ", ".join(names[:_MAX_LISTED])
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return f"{len(names)} {noun}{'s' if len(names) > 1 else ''}: {shown}{more}"
