"""Shapes that do not fit are refused by field, value and rule; the rest is resolved."""

import pytest
from builders import tiny_config

from moe_peft import RopeScaling

REFUSED = [
    ({"vocab_size": 0}, "vocab_size=0 must be at least 1"),
    ({"hidden_size": -24}, "hidden_size=-24"),
    ({"intermediate_size": 0}, "intermediate_size=0"),
    ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
    ({"num_attention_heads": 0}, "num_attention_heads=0"),
    ({"num_key_value_heads": 0}, "num_key_value_heads=0"),
    ({"max_position_embeddings": 0}, "max_position_embeddings=0"),
    ({"num_key_value_heads": 3}, "num_attention_heads=4 must be a multiple of num_key_value_heads=3"),
    ({"num_key_value_heads": 8}, "num_attention_heads=4 must be a multiple of num_key_value_heads=8"),
    ({"hidden_size": 26}, "hidden_size=26 must be a multiple of num_attention_heads=4, or head_dim"),
    ({"head_dim": 5}, "head_dim=5 must be even"),
    ({"head_dim": 0}, "head_dim=0"),
    ({"hidden_size": 12}, "head_dim=3 must be even"),
    ({"sliding_window": 0}, "sliding_window=0 must be at least 1"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


ROPE_REFUSED = [
    ({"rope_type": "longrope"}, "rope_type='longrope' must be one of linear, llama3, dynamic, yarn"),
    ({"rope_type": "linear", "factor": 0.5}, "factor=0.5 of rope_type='linear' must be at least 1"),
    ({"rope_type": "linear", "factor": float("nan")}, "factor=nan"),
    ({"rope_type": "llama3", "factor": 8.0}, "needs original_max_position_embeddings"),
    (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "original_max_position_embeddings": 32,
            "low_freq_factor": 4.0,
            "high_freq_factor": 4.0,
        },
        "high_freq_factor=4.0 must be above low_freq_factor=4.0",
    ),
]


@pytest.mark.parametrize(("fields", "message"), ROPE_REFUSED)
def test_rope_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        RopeScaling(**fields)


def test_dynamic_rope_needs_more_than_one_pair():
    """Its exponent is head_dim / (head_dim - 2)."""
    with pytest.raises(ValueError, match="head_dim=2"):
        tiny_config(head_dim=2, rope_scaling=RopeScaling(rope_type="dynamic", factor=2.0))


def test_defaults_are_resolved():
    config = tiny_config(num_key_value_heads=None)
    assert config.num_key_value_heads == config.num_kv_heads == 4
    assert config.head_dim == config.head_size == 6
    assert tiny_config(head_dim=10).head_size == 10
    assert tiny_config(hidden_size=26, head_dim=6).head_size == 6
