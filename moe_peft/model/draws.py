"""Random draws as a function of named keys, never of global RNG state."""

import hashlib

import torch
from torch import Tensor

from moe_peft import strict

_CPU = torch.device("cpu")
_CPU_CHUNK = 1 << 16  # numbers drawn at once: 256 KB


def checked_seed(seed: object) -> int:
    """A seed, as a config file would take it.

    Raises:
        ValueError: when it is none.
    """
    number: int = strict.coerce(seed, int, "seed")
    if not 0 <= number < 2**63:
        raise ValueError(f"seed={strict.show(seed)} must be in 0..2**63-1")
    return number


def generator_for(*key: object, device: torch.device = _CPU) -> torch.Generator:
    """A generator whose stream is fixed by the key, on every machine and in every process.

    Args:
        key: ints and strings, e.g. ``(seed, adapter, "dropout", step, micro_batch, layer, input)``.
        device: where it draws. A GPU's stream is another one than the CPU's.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    # Bit 63 stays clear: manual_seed takes a signed 64-bit number.
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


def _drawn_on(device: torch.device) -> torch.device:
    """Where numbers for a tensor there are drawn: a GPU must neither wait for them nor fetch them."""
    return device if device.type == "cuda" else _CPU


def dropout_mask(shape: tuple[int, ...], p: float, *, like: Tensor, key: tuple[object, ...]) -> Tensor:
    """A mask of zeros and ``1 / (1 - p)``, in the dtype and on the device of ``like``.

    A function of the key and of the kind of device: CPUs and CUDA GPUs have generators, and so masks, of their own.
    """
    device = _drawn_on(like.device)
    generator = generator_for(*key, device=device)
    mask = torch.empty(shape, dtype=like.dtype, device=device)
    flat = mask.view(-1)
    # The stream is the same however it is cut; on a CPU a buffer that stays in cache costs no page faults.
    size = min(_CPU_CHUNK, flat.numel()) if device.type == "cpu" else flat.numel()
    uniform = torch.empty(size, dtype=torch.float32, device=device)
    for part in flat.split(max(size, 1)):
        torch.ge(uniform[: part.numel()].uniform_(generator=generator), p, out=part).div_(1 - p)
    return mask.to(like.device)


def uniform_noise(shape: tuple[int, ...], low: float, high: float, *, like: Tensor, key: tuple[object, ...]) -> Tensor:
    """Draws from ``low..high``, in the dtype and on the device of ``like``; a function of what a mask is one of."""
    device = _drawn_on(like.device)
    noise = torch.empty(shape, dtype=like.dtype, device=device)
    return noise.uniform_(low, high, generator=generator_for(*key, device=device)).to(like.device)
