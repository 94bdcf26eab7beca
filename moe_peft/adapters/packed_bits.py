"""Small whole numbers as a stream of bits in bytes."""

import torch
from torch import Tensor


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Whole numbers below ``2**bits``, the lowest bit first and without gaps.

    Args:
        values: uint8, of any shape.
        bits: of each, 1..8.

    Returns:
        uint8 ``[ceil(bits * number of values / 8)]``; what is left of the last byte is ones.
    """
    weights = torch.arange(8, dtype=torch.uint8, device=values.device)
    stream = ((values.flatten()[:, None] >> weights[:bits]) & 1).flatten()
    stream = torch.nn.functional.pad(stream, (0, -stream.numel() % 8), value=1)
    return (stream.view(-1, 8) << weights).sum(dim=1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, bits: int) -> Tensor:
    """As many whole numbers as the bytes have room for, uint8 ``[8 * bytes // bits]``: what was packed, then ones."""
    weights = torch.arange(8, dtype=torch.uint8, device=packed.device)
    stream = ((packed[:, None] >> weights) & 1).flatten()
    count = stream.numel() // bits
    return (stream[: count * bits].view(count, bits) << weights[:bits]).sum(dim=1, dtype=torch.uint8)
