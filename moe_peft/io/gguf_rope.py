"""LLaMA 3's RoPE scaling, found again in the ``rope_freqs.weight`` that llama.cpp's converter bakes it into.

The tensor divides each frequency. Its values follow from factor, trained context and two cut-offs, of which only the
factor and a straight line in the frequency matter: any trained context can be chosen, and the cut-offs solved for.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from moe_peft.model.config import LlamaConfig, RopeScaling
from moe_peft.model.rope import inverse_frequencies

_ORIGINAL_CONTEXT = 8192
_TOLERANCE = 1e-5


def with_baked_scaling(config: LlamaConfig, divisors: Tensor) -> LlamaConfig:
    """The config with the scaling that the divisors stand for.

    Args:
        config: its ``rope_scaling`` must be None unless all divisors are 1.
        divisors: float32 ``[head_dim / 2]``.

    Raises:
        ValueError: on divisors that are no LLaMA 3 scaling, or that come on top of another scaling.
    """
    if divisors.shape != (config.head_size // 2,):
        raise ValueError(f"rope_freqs.weight has shape {list(divisors.shape)}; it must be [{config.head_size // 2}]")
    if bool((divisors == 1).all()):
        return config
    if config.rope_scaling is not None:
        raise ValueError(
            f"rope_freqs.weight on top of rope.scaling.type={config.rope_scaling.rope_type} is not supported"
        )
    plain = _frequencies(config)
    for scaling in _candidates(plain, divisors.double()):
        candidate = replace(config, rope_scaling=scaling)
        if torch.allclose(plain / _frequencies(candidate), divisors.double(), rtol=_TOLERANCE):
            return candidate
    raise ValueError("rope_freqs.weight is not supported: its values are not a LLaMA 3 scaling of the frequencies")


def _frequencies(config: LlamaConfig) -> Tensor:
    return inverse_frequencies(config, None, device=torch.device("cpu"), dtype=torch.float64)


def _candidates(frequencies: Tensor, divisors: Tensor) -> Iterator[RopeScaling]:
    factor = float(divisors.max())
    if not math.isfinite(factor) or bool((divisors < 1).any()):
        return
    yield _scaling(factor, low=1.0, high=4.0)
    kept = (1 / divisors - 1 / factor) / (1 - 1 / factor)
    between = (kept > _TOLERANCE) & (kept < 1 - _TOLERANCE)
    if int(between.sum()) < 2:
        return
    # kept = (rotations over the trained context - low) / (high - low)
    rotations = _ORIGINAL_CONTEXT * frequencies[between] / (2 * math.pi)
    line = torch.linalg.lstsq(torch.stack([rotations, torch.ones_like(rotations)], dim=1), kept[between, None]).solution
    slope, intercept = line.flatten().tolist()
    if slope > 0:
        yield _scaling(factor, low=-intercept / slope, high=(1 - intercept) / slope)


def _scaling(factor: float, *, low: float, high: float) -> RopeScaling:
    return RopeScaling(
        rope_type="llama3",
        factor=factor,
        original_max_position_embeddings=_ORIGINAL_CONTEXT,
        low_freq_factor=low,
        high_freq_factor=high,
    )
