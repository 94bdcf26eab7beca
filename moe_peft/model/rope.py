"""Rotary position embedding: frequencies of every scaling kind, tables, and their application.

Letters: T tokens, B samples, H heads, d features per head.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from moe_peft.model.config import LlamaConfig, RopeScaling


def rotary_table(
    config: LlamaConfig, past_lengths: Sequence[int], new_lengths: Sequence[int], *, device: torch.device, double: bool
) -> tuple[Tensor, Tensor]:
    """Cosines and sines for the new tokens of every sample, laid end to end.

    Args:
        past_lengths: tokens of each sample that are already in the KV cache.
        new_lengths: tokens of each sample in this forward.
        double: compute in float64 (a float64 base), otherwise in float32 as transformers does.

    Returns:
        cos and sin, ``[T, 1, d]``, multiplied by the attention factor of yarn.
    """
    dtype = torch.float64 if double else torch.float32
    positions = torch.cat(
        [torch.arange(past, past + new, device=device) for past, new in zip(past_lengths, new_lengths, strict=True)]
    )  # [T]
    if config.rope_scaling is not None and config.rope_scaling.rope_type == "dynamic":
        # Each sample stretches by its own length: a longer neighbour must not change it.
        totals = [past + new for past, new in zip(past_lengths, new_lengths, strict=True)]
        frequencies = torch.cat(
            [
                inverse_frequencies(config, total, device=device, dtype=dtype)[None].expand(new, -1)
                for total, new in zip(totals, new_lengths, strict=True)
            ]
        )  # [T, d/2]
    else:
        frequencies = inverse_frequencies(config, None, device=device, dtype=dtype)[None]  # [1, d/2]
    angles = positions[:, None].to(dtype) * frequencies  # [T, d/2]
    angles = torch.cat([angles, angles], dim=-1)[:, None]  # [T, 1, d]
    factor = _attention_factor(config.rope_scaling)
    return angles.cos() * factor, angles.sin() * factor


def inverse_frequencies(
    config: LlamaConfig, sample_length: int | None, *, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Radians per token of each feature pair, ``[d/2]``.

    Args:
        sample_length: tokens of the sample so far; only ``dynamic`` scaling looks at it.
    """
    scaling = config.rope_scaling
    theta = config.rope_theta
    dim = config.head_size
    if scaling is not None and scaling.rope_type == "dynamic":
        theta = _dynamic_theta(config, scaling, sample_length)
    frequencies = 1.0 / theta ** (torch.arange(0, dim, 2, device=device, dtype=dtype) / dim)
    if scaling is None or scaling.rope_type == "dynamic":
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    if scaling.rope_type == "llama3":
        return _llama3(frequencies, scaling)
    return _yarn(frequencies, config, scaling)


def _dynamic_theta(config: LlamaConfig, scaling: RopeScaling, sample_length: int | None) -> float:
    """NTK-aware base for a sample of this length (https://www.reddit.com/r/LocalLLaMA/comments/14mrgpr/)."""
    trained = config.max_position_embeddings
    length = max(sample_length or 0, trained)
    stretch = scaling.factor * length / trained - (scaling.factor - 1)
    return config.rope_theta * stretch ** (config.head_size / (config.head_size - 2))


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """LLaMA 3.1: long wavelengths divided by the factor, short ones kept, a linear blend between."""
    assert scaling.original_max_position_embeddings is not None
    rotations = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)  # over the trained context
    keep = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0, 1)
    return (1 - keep) * frequencies / scaling.factor + keep * frequencies


def _yarn(frequencies: Tensor, config: LlamaConfig, scaling: RopeScaling) -> Tensor:
    """YaRN's NTK-by-parts (https://arxiv.org/abs/2309.00071, section 3.2)."""
    trained = scaling.original_max_position_embeddings or config.max_position_embeddings
    dim = config.head_size

    def pair_with(rotations: float) -> float:
        return dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = pair_with(scaling.beta_fast), pair_with(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a ramp of no width would divide by zero
    ramp = (torch.arange(dim // 2, device=frequencies.device, dtype=frequencies.dtype) - low) / (high - low)
    interpolate = ramp.clamp(0, 1)
    return frequencies / scaling.factor * interpolate + frequencies * (1 - interpolate)


def _attention_factor(scaling: RopeScaling | None) -> float:
    """YaRN's temperature on cos and sin; 1 for every other kind."""
    if scaling is None or scaling.rope_type != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def temperature(coefficient: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * coefficient * math.log(scaling.factor) + 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return temperature(scaling.mscale) / temperature(scaling.mscale_all_dim)
    return temperature(1.0)
