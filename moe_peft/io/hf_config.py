"""A Hugging Face ``config.json`` read as a `LlamaConfig`, or refused by the field that our model would not honour.

Defaults of absent fields are those of transformers 5's configuration classes. Fields that its modelling code never
reads for these model types (token ids, ``use_cache``, ``initializer_range``, labels …) are ignored here too.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from moe_peft.io.fields import read_field
from moe_peft.io.hf_rope import read_rope
from moe_peft.io.json_file import read_json_object
from moe_peft.model.config import LlamaConfig
from moe_peft.strict import did_you_mean, show


@dataclass(frozen=True, kw_only=True)
class _Family:
    """What sets a model type apart.

    Args:
        class_prefix: transformers' classes are ``{class_prefix}ForCausalLM`` and ``{class_prefix}Model``.
        reads: the boolean fields this type's modelling code looks at; others of them mean nothing to it.
        window: ``never``; ``always`` when set; ``layers``: by ``use_sliding_window`` and ``layer_types``.
    """

    class_prefix: str
    sizes: dict[str, int]
    reads: tuple[str, ...] = ()
    window: str = "never"
    extra: dict[str, bool] = field(default_factory=dict)


_SIZES = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}
_MISTRAL_SIZES = {**_SIZES, "intermediate_size": 14336, "max_position_embeddings": 131072, "num_key_value_heads": 8}
_QWEN_SIZES = {
    **_SIZES,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
}
_FAMILIES = {
    "llama": _Family(class_prefix="Llama", sizes=_SIZES, reads=("attention_bias", "mlp_bias")),
    "mistral": _Family(class_prefix="Mistral", sizes=_MISTRAL_SIZES, window="always"),
    "qwen2": _Family(class_prefix="Qwen2", sizes=_QWEN_SIZES, window="layers", extra={"qkv_bias": True}),
    "qwen3": _Family(
        class_prefix="Qwen3",
        sizes={**_QWEN_SIZES, "head_dim": 128},
        reads=("attention_bias",),
        window="layers",
        extra={"qk_norm": True},
    ),
}
_FULL, _SLIDING = "full_attention", "sliding_attention"
_WINDOW_RULE = f"all layers must be {_FULL}, or all {_SLIDING}"
_DEFAULT_WINDOW = 4096
_DEFAULT_MAX_WINDOW_LAYERS = 28

# Fields that change what a model computes and that no model here has, with the values that change nothing. Most
# belong to neighbouring architectures (Granite, Gemma, Cohere, MiniCPM, mixtures of experts) and would make a
# relabelled config silently wrong.
_REFUSED: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu", "swish"),
    "hidden_activation": (None, "silu", "swish"),
    "attention_dropout": (None, 0),
    "hidden_dropout": (None, 0),
    "resid_pdrop": (None, 0),
    "embd_pdrop": (None, 0),
    "pretraining_tp": (None, 0, 1),
    "rotary_pct": (None, 1),
    "quantization_config": (None,),
    "compression_config": (None,),
    "auto_map": (None,),
    "per_layer_config": (None, {}),
    "pruned_heads": (None, {}),
    "is_causal": (None, True),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "use_bidirectional_attention": (None, False),
    "final_logit_softcapping": (None,),
    "attn_logit_softcapping": (None,),
    "logit_scale": (None, 1),
    "logits_scaling": (None, 1),
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "attention_multiplier": (None,),
    "scale_emb": (None, 1),
    "scale_depth": (None,),
    "query_pre_attn_scalar": (None,),
    "clip_qkv": (None,),
    "alibi": (None, False),
    "use_mrope": (None, False),
    "use_qk_norm": (None, False),
    "qk_layernorm": (None, False),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "n_routed_experts": (None, 0),
    "attention_chunk_size": (None,),
    "no_rope_layers": (None, []),
    "attn_temperature_tuning": (None, False, 0),
}


def read_llama_config(folder: str | Path) -> LlamaConfig:
    """The config of a Hugging Face model folder.

    Raises:
        FileNotFoundError: the folder has no config.json.
        ValueError: it is not valid, or asks for something that is not supported; the message names the field.
    """
    path = Path(folder) / "config.json"
    try:
        return llama_config_from_dict(read_json_object(path))
    except ValueError as error:
        message = str(error)
        raise ValueError(message if str(path) in message else f"{path}: {message}") from error


def llama_config_from_dict(config: Mapping[str, object]) -> LlamaConfig:
    """A `LlamaConfig` from the fields of a ``config.json``.

    Raises:
        ValueError: on an architecture or field that is not supported, or a value of the wrong type or range.
    """
    family = _family_of(config)
    for name, neutral in _REFUSED.items():
        if name in config and config[name] not in neutral:
            raise ValueError(
                f"{name}={config[name]!r} is not supported: it must be "
                f"{' or '.join('absent' if value is None else repr(value) for value in neutral)}"
            )
    sizes = {name: read_field(config, name, int, default) for name, default in family.sizes.items()}
    # Null says "as many as query heads", where an absent field has the type's own default.
    if "num_key_value_heads" not in sizes or config.get("num_key_value_heads", 0) is None:
        sizes["num_key_value_heads"] = read_field(config, "num_key_value_heads", int, sizes["num_attention_heads"])
    if config.get("head_dim") is not None:
        sizes["head_dim"] = read_field(config, "head_dim", int)
    rms_norm_eps = read_field(config, "rms_norm_eps", float, 1e-6)
    if rms_norm_eps < 0:
        raise ValueError(f"rms_norm_eps={rms_norm_eps} must not be negative")
    rope_theta, rope_scaling = read_rope(config, sizes["max_position_embeddings"])
    switches = {name: read_field(config, name, bool, False) for name in family.reads}
    return LlamaConfig(
        **sizes,
        **switches,
        **family.extra,
        rms_norm_eps=rms_norm_eps,
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tie_word_embeddings=read_field(config, "tie_word_embeddings", bool, False),
        sliding_window=_sliding_window(config, family, sizes["num_hidden_layers"]),
    )


def _family_of(config: Mapping[str, object]) -> _Family:
    model_type = config.get("model_type")
    if model_type not in _FAMILIES:
        raise ValueError(
            f"model_type={model_type!r} is not supported: it must be one of {', '.join(_FAMILIES)}"
            f"{did_you_mean(model_type, _FAMILIES)}"
        )
    family = _FAMILIES[str(model_type)]
    supported = {f"{family.class_prefix}ForCausalLM", f"{family.class_prefix}Model", "LLaMAForCausalLM"}
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not supported.issuperset(map(str, architectures)):
        raise ValueError(
            f"architectures={architectures!r} is not supported: it must be [{family.class_prefix + 'ForCausalLM'!r}]"
        )
    return family


def _sliding_window(config: Mapping[str, object], family: _Family, num_layers: int) -> int | None:
    """One window for all layers, or None."""
    window_is_on = config.get("sliding_window", _DEFAULT_WINDOW) is not None and (
        family.window == "always"
        or (family.window == "layers" and read_field(config, "use_sliding_window", bool, False))
    )
    first_layer = num_layers
    if window_is_on:
        by_layer = family.window == "layers"
        first_layer = read_field(config, "max_window_layers", int, _DEFAULT_MAX_WINDOW_LAYERS) if by_layer else 0

    layer_types = config.get("layer_types")
    if layer_types is not None:
        if not isinstance(layer_types, list) or len(layer_types) != num_layers:
            raise ValueError(f"layer_types={show(layer_types)} must list num_hidden_layers={num_layers} names")
        implied = [_SLIDING if layer >= first_layer else _FULL for layer in range(num_layers)]
        # Qwen's list overrides max_window_layers; any other contradiction tells of an architecture that is not ours.
        if layer_types != implied and not (window_is_on and family.window == "layers"):
            raise ValueError(f"layer_types={show(layer_types)} is not supported: it must be {show(implied)}")
        first_layer = layer_types.index(_SLIDING) if _SLIDING in layer_types else num_layers
        if layer_types != [_FULL] * first_layer + [_SLIDING] * (num_layers - first_layer):
            raise ValueError(f"layer_types={show(layer_types)} is not supported: {_WINDOW_RULE}")
    if first_layer >= num_layers:
        return None
    if first_layer > 0:
        raise ValueError(
            f"sliding windows from layer {first_layer} on (max_window_layers, layer_types) are not supported: "
            f"{_WINDOW_RULE}"
        )
    window: int = read_field(config, "sliding_window", int, _DEFAULT_WINDOW)
    return window
