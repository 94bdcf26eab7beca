"""GGUF metadata read as llama.cpp reads it, or refused by the key that would be lost."""

import pytest
from gguf_models import config_with, tiny_model

from moe_peft import RopeScaling


def test_config_defaults_where_metadata_is_silent(tmp_path):
    config = config_with(tmp_path, metadata={"rope.freq_base": None, "context_length": None, "vocab_size": None})
    assert (config.rope_theta, config.max_position_embeddings) == (10000.0, 2048)
    assert config.vocab_size == 40
    assert config.sliding_window is None


def test_values_per_layer_count_when_they_agree(tmp_path):
    assert config_with(tmp_path, metadata={"attention.head_count": [2]}).num_attention_heads == 2


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 1.0}, None),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, RopeScaling(rope_type="linear", factor=4.0)),
        ({"rope.scale_linear": 4.0}, RopeScaling(rope_type="linear", factor=4.0)),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16},
            RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=16),
        ),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.yarn_beta_fast": 16.0},
            RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=16.0),
        ),
    ],
)
def test_rope_scaling(metadata, expected, tmp_path):
    assert config_with(tmp_path, metadata=metadata).rope_scaling == expected


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"expert_count": 8}, "llama.expert_count=8 is not supported"),
        ({"final_logit_softcapping": 30.0}, "llama.final_logit_softcapping=30.0 is not supported"),
        ({"attention.causal": False}, "llama.attention.causal=False is not supported"),
        ({"attention.scale": 0.5}, "llama.attention.scale=0.5 is not supported"),
        (
            {"rope.scaling.type": "longrope", "rope.scaling.factor": 2.0},
            "scaling.type='longrope' is not supported",
        ),
        ({"rope.scaling.yarn_attn_factor": 0.5}, "llama.rope.scaling.yarn_attn_factor=0.5 is not supported"),
        ({"rope.dimension_count": 8}, "llama.rope.dimension_count=8 must equal the head size, 16"),
        ({"attention.value_length": 8}, "llama.attention.value_length=8 must equal"),
        ({"rope.freq_base": 0.0}, "llama.rope.freq_base=0.0 must be positive"),
        ({"block_count": None}, "lacks llama.block_count"),
        ({"block_count": "two"}, "llama.block_count='two' must be int"),
        ({"attention.head_count": [2, 4]}, r"llama.attention.head_count=\[2, 4\] must be int"),
        ({"attention.head_count": 0}, "llama.attention.head_count=0 must be at least 1"),
        ({"feed_forward_length": 64}, r"ffn_gate\.weight has shape \[32, 32\] where the config says \[64, 32\]"),
        ({"split.count": 3}, "is one of 3 parts: join them with"),
    ],
)
def test_metadata_that_is_refused_by_name(metadata, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        config_with(tmp_path, metadata=metadata)
    assert "model.gguf" in str(caught.value)


def test_another_architecture(tmp_path):
    with pytest.raises(ValueError, match=r"general\.architecture='gemma2' is not supported: it must be one of llama"):
        config_with(tmp_path, architecture="gemma2")


def test_qwen_with_a_window(tmp_path):
    with pytest.raises(ValueError, match=r"qwen2\.attention\.sliding_window=9 is not supported"):
        config_with(tmp_path, tiny_model(family="qwen2"), metadata={"attention.sliding_window": 9})
