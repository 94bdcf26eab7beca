"""Random draws as a function of named keys, never of global RNG state."""

import hashlib

import torch
from torch import Tensor


def generator_for(*key: object) -> torch.Generator:
    """A CPU generator whose stream is fixed by the key, on every machine and in every process.

    Args:
        key: ints and strings, e.g. ``(seed, adapter, "dropout", step, micro_batch, layer, input)``.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    # Bit 63 stays clear: manual_seed takes a signed 64-bit number.
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def dropout_mask(shape: tuple[int, ...], p: float, *, like: Tensor, key: tuple[object, ...]) -> Tensor:
    """A mask of zeros and ``1 / (1 - p)``, in the dtype and on the device of ``like``."""
    keep = torch.rand(shape, generator=generator_for(*key)) >= p
    return keep.to(device=like.device, dtype=like.dtype).div_(1 - p)
