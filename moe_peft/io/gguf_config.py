"""The metadata of a GGUF file read as a `LlamaConfig`, or refused by the key that our model would not honour.

Meaning and defaults of the keys are llama.cpp's (``src/llama-model.cpp``).
"""

from collections.abc import Mapping
from typing import Any

from moe_peft.io.gguf_file import GgufFile
from moe_peft.model.config import LlamaConfig, RopeScaling
from moe_peft.strict import coerce, did_you_mean, show

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # Mistral models call themselves llama
_DEFAULT_THETA = 10000.0
_DEFAULT_BETA_FAST, _DEFAULT_BETA_SLOW = 32.0, 1.0

# Keys (after the architecture's name) that change what a model computes and that no model here has, with the values
# that change nothing.
_REFUSED: dict[str, tuple[object, ...]] = {
    "expert_count": (0,),
    "use_parallel_residual": (False,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "attention.scale": (0.0,),
    "attention.output_scale": (0.0, 1.0),
    "attention.temperature_length": (0,),
    "attention.temperature_scale": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.causal": (True,),
    "attention.sliding_window_pattern": (),
    "attention.shared_kv_layers": (0,),
    "rope.dimension_sections": ([0, 0, 0, 0],),
    "rope.scaling.alpha": (0.0,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "rope.scaling.yarn_ext_factor": (1.0, -1.0),
}


def read_gguf_config(file: GgufFile) -> LlamaConfig:
    """The model's shape, from the metadata and the directory of tensors.

    Frequencies that the file bakes into a tensor are `moe_peft.io.gguf_rope`'s business.

    Raises:
        ValueError: an architecture or key that is not supported, or a value that is missing, mistyped or out of range.
    """
    architecture = file.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"general.architecture={architecture!r} is not supported: it must be one of {', '.join(ARCHITECTURES)}"
            f"{did_you_mean(architecture, ARCHITECTURES)}"
        )
    keys = _Keys(str(architecture), file.metadata)
    for name, neutral in _REFUSED.items():
        value = keys.get(name)
        if value is not None and value not in neutral:
            raise ValueError(f"{architecture}.{name}={show(value)} is not supported")
    hidden_size = keys.integer("embedding_length")
    num_heads = keys.integer("attention.head_count")
    if num_heads < 1:
        raise ValueError(f"{architecture}.attention.head_count={num_heads} must be at least 1")
    head_dim = keys.integer("attention.key_length", hidden_size // num_heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if keys.integer(name, head_dim) != head_dim:
            raise ValueError(f"{architecture}.{name}={keys.get(name)} must equal the head size, {head_dim}")
    context = keys.integer("context_length", 2048)
    rope_theta = keys.number("rope.freq_base", _DEFAULT_THETA)
    if rope_theta <= 0:
        raise ValueError(f"{architecture}.rope.freq_base={rope_theta} must be positive")

    def has(name: str) -> bool:
        return f"blk.0.{name}" in file.tensors

    return LlamaConfig(
        vocab_size=_vocabulary_size(file),
        hidden_size=hidden_size,
        intermediate_size=keys.integer("feed_forward_length"),
        num_hidden_layers=keys.integer("block_count"),
        num_attention_heads=num_heads,
        num_key_value_heads=keys.integer("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        max_position_embeddings=context,
        rms_norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        rope_theta=rope_theta,
        rope_scaling=_rope_scaling(keys, context),
        tie_word_embeddings="output.weight" not in file.tensors,
        attention_bias=has("attn_q.bias") and has("attn_output.bias"),
        qkv_bias=has("attn_q.bias"),
        mlp_bias=has("ffn_gate.bias"),
        qk_norm=architecture == "qwen3",
        sliding_window=_sliding_window(keys),
    )


class _Keys:
    """The metadata under the architecture's own name."""

    def __init__(self, architecture: str, metadata: Mapping[str, object]) -> None:
        self.architecture = architecture
        self._metadata = metadata

    def get(self, name: str) -> object:
        value = self._metadata.get(f"{self.architecture}.{name}")
        # One value for each layer: fine as long as the layers agree.
        if isinstance(value, list) and value and all(item == value[0] for item in value) and name in _PER_LAYER:
            return value[0]
        return value

    def integer(self, name: str, default: int | None = None) -> int:
        value: int = self._typed(name, int, default)
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value: float = self._typed(name, float, default)
        return value

    def _typed(self, name: str, hint: type, default: object) -> Any:
        value = self.get(name)
        if value is None and default is None:
            raise ValueError(f"the metadata lacks {self.architecture}.{name}")
        return coerce(default if value is None else value, hint, f"{self.architecture}.{name}")


_PER_LAYER = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")


def _vocabulary_size(file: GgufFile) -> int:
    """Rows of the embedding: metadata and token list may count without padding."""
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ValueError("lacks the tensor token_embd.weight with two dimensions")
    return embedding.shape[0]


def _sliding_window(keys: _Keys) -> int | None:
    window = keys.integer("attention.sliding_window", 0)
    if window and keys.architecture != "llama":
        raise ValueError(f"{keys.architecture}.attention.sliding_window={window} is not supported: it must be 0")
    return window or None


def _rope_scaling(keys: _Keys, context: int) -> RopeScaling | None:
    kind = keys.get("rope.scaling.type")
    factor = keys.number("rope.scaling.factor", 0.0) or keys.number("rope.scale_linear", 0.0) or 1.0
    if kind not in (None, "none", "linear", "yarn"):
        raise ValueError(
            f"{keys.architecture}.rope.scaling.type={kind!r} is not supported: it must be none, linear or yarn"
        )
    if kind == "none" or factor == 1.0:
        return None
    if kind != "yarn":
        return RopeScaling(rope_type="linear", factor=factor)
    return RopeScaling(
        rope_type="yarn",
        factor=factor,
        original_max_position_embeddings=keys.integer("rope.scaling.original_context_length", context),
        beta_fast=keys.number("rope.scaling.yarn_beta_fast", _DEFAULT_BETA_FAST),
        beta_slow=keys.number("rope.scaling.yarn_beta_slow", _DEFAULT_BETA_SLOW),
    )
