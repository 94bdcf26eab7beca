"""A `LlamaConfig` written as the fields of a Hugging Face ``config.json``: the way back of `moe_peft.io.hf_config`."""

import dataclasses
from dataclasses import replace
from typing import Any

import torch

from moe_peft.io.hf_config import llama_config_from_dict
from moe_peft.model.config import LlamaConfig, RopeScaling

_CLASS_PREFIX = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
_ROPE_FIELDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}


def hf_config_fields(config: LlamaConfig) -> dict[str, Any]:
    """The fields that say what the model computes, for the model type that computes it.

    Raises:
        ValueError: when no model type has this combination of switches.
    """
    model_type, meant = _model_type(config), normalized(config)
    fields: dict[str, Any] = {
        "architectures": [architecture(model_type)],
        "model_type": model_type,
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        # The spelling that transformers before 5 knows too.
        "rope_theta": config.rope_theta,
        "rope_scaling": None if meant.rope_scaling is None else _rope_fields(meant.rope_scaling),
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    if model_type in ("llama", "qwen3"):
        fields["attention_bias"] = config.attention_bias
    if model_type == "llama":
        fields["mlp_bias"] = config.mlp_bias
    else:
        fields["sliding_window"] = config.sliding_window
    if model_type in ("qwen2", "qwen3"):
        fields |= {"use_sliding_window": config.sliding_window is not None, "max_window_layers": 0}
    read = llama_config_from_dict(fields)
    if read != meant:
        names = [field.name for field in dataclasses.fields(meant)]
        differing = ", ".join(
            f"{name}={getattr(meant, name)!r}" for name in names if getattr(read, name) != getattr(meant, name)
        )
        raise ValueError(f"no Hugging Face model type has {differing}: the nearest, {model_type}, has other values")
    return fields


def architecture(model_type: str) -> str:
    """The class that transformers loads a language model of this type with."""
    return f"{_CLASS_PREFIX[model_type]}ForCausalLM"


def dtype_name(dtype: torch.dtype) -> str:
    """As a ``config.json`` spells it."""
    return str(dtype).removeprefix("torch.")


def normalized(config: LlamaConfig) -> LlamaConfig:
    """The config without what changes nothing."""
    scaling = config.rope_scaling
    if scaling is not None:
        kept = {name: getattr(scaling, name) for name in _ROPE_FIELDS[scaling.rope_type]}
        if scaling.rope_type == "yarn":
            kept["original_max_position_embeddings"] = (
                scaling.original_max_position_embeddings or config.max_position_embeddings
            )
        scaling = RopeScaling(rope_type=scaling.rope_type, **kept)
    return replace(config, rope_scaling=scaling, qkv_bias=config.qkv_bias and not config.attention_bias)


def _model_type(config: LlamaConfig) -> str:
    if config.qk_norm:
        return "qwen3"
    if config.qkv_bias and not config.attention_bias:
        return "qwen2"
    return "llama" if config.sliding_window is None else "mistral"


def _rope_fields(scaling: RopeScaling) -> dict[str, Any]:
    values = {name: getattr(scaling, name) for name in _ROPE_FIELDS[scaling.rope_type]}
    return {"rope_type": scaling.rope_type, **{name: value for name, value in values.items() if value is not None}}
