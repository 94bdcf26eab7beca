"""LLaMA 3's scaling, found again in the divisors that a converter bakes it into."""

import math

import numpy as np
import pytest
import torch
from builders import assert_close, random_samples
from gguf_maker import write_gguf
from gguf_models import config_with, logits_of, tiny_model

from moe_peft import load_base_model


def llama3_divisors(head_dim, theta, factor, low, high, original):
    """llama.cpp's converter, in words: kept, divided, or blended by wavelength."""
    divisors = []
    for pair in range(head_dim // 2):
        wavelength = 2 * math.pi * theta ** (2 * pair / head_dim)
        if wavelength < original / high:
            divisors.append(1.0)
        elif wavelength > original / low:
            divisors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, dtype=np.float32)


@pytest.mark.parametrize(
    ("theta", "factor", "low", "high", "original"),
    [(500000.0, 8.0, 1.0, 4.0, 8192), (500000.0, 32.0, 1.0, 4.0, 8192), (10000.0, 4.0, 0.5, 6.0, 100)],
)
def test_baked_llama3_scaling_is_found_again(theta, factor, low, high, original, tmp_path):
    rope = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
    theirs = tiny_model(head_dim=64, max_position_embeddings=16384, rope_parameters=rope)
    divisors = llama3_divisors(64, theta, factor, low, high, original)
    assert ((divisors > 1.01) & (divisors < factor * 0.99)).sum() >= 2
    write_gguf(tmp_path / "model.gguf", theirs, extra_tensors={"rope_freqs.weight": divisors})
    ours = load_base_model(tmp_path / "model.gguf", device="cpu")
    sample = random_samples([300], vocab=40)[0]
    with torch.no_grad():
        expected = theirs(torch.tensor([sample])).logits[0]
    assert_close(logits_of(ours, sample), expected, 1e-4)


def test_divisors_of_one_are_no_scaling(tmp_path):
    config = config_with(tmp_path, extra_tensors={"rope_freqs.weight": np.ones(8, dtype=np.float32)})
    assert config.rope_scaling is None


@pytest.mark.parametrize(
    ("divisors", "metadata", "message"),
    [
        (np.linspace(1, 3, 8), {}, r"rope_freqs\.weight is not supported: its values are not a LLaMA 3 scaling"),
        (np.full(8, 0.5), {}, r"rope_freqs\.weight is not supported"),
        (np.full(8, np.nan), {}, r"rope_freqs\.weight is not supported"),
        (np.full(7, 2.0), {}, r"rope_freqs\.weight has shape \[7\]; it must be \[8\]"),
        (np.full(8, 2.0), {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}, "on top of rope.scaling.type"),
    ],
)
def test_divisors_that_are_refused(divisors, metadata, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config_with(tmp_path, metadata=metadata, extra_tensors={"rope_freqs.weight": divisors.astype(np.float32)})
