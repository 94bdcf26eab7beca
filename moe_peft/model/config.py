"""The shape of a LLaMA-family model."""

import math
from dataclasses import dataclass

ROPE_TYPES = ("linear", "llama3", "dynamic", "yarn")


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the context they were trained on.

    Args:
        rope_type: ``linear``, ``llama3``, ``dynamic`` or ``yarn``; without scaling use ``rope_scaling=None``.
        factor: how many times longer the context becomes.
        original_max_position_embeddings: the context length of pre-training, in tokens (llama3, dynamic, yarn).
        low_freq_factor: wavelengths above ``original / low_freq_factor`` are divided by ``factor`` (llama3).
        high_freq_factor: wavelengths below ``original / high_freq_factor`` are kept (llama3).
        beta_fast: rotations over the original context above which a frequency is kept (yarn).
        beta_slow: rotations over the original context below which a frequency is interpolated (yarn).
        attention_factor: scale of cos and sin; None derives it from ``factor`` and the mscales (yarn).
        mscale: numerator coefficient of the derived attention factor (yarn, as in DeepSeek).
        mscale_all_dim: denominator coefficient of the derived attention factor (yarn).
        truncate: round the yarn ramp's ends to whole dimensions.

    Raises:
        ValueError: on an unknown type, or a value outside its rule.
    """

    rope_type: str
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_TYPES:
            raise ValueError(f"rope_type={self.rope_type!r} must be one of {', '.join(ROPE_TYPES)}, or default")
        if not 1.0 <= self.factor < math.inf:
            raise ValueError(f"factor={self.factor} of rope_type={self.rope_type!r} must be at least 1 and finite")
        if self.rope_type == "llama3":
            if self.original_max_position_embeddings is None:
                raise ValueError("rope_type='llama3' needs original_max_position_embeddings")
            if self.high_freq_factor <= self.low_freq_factor:
                raise ValueError(
                    f"high_freq_factor={self.high_freq_factor} must be above low_freq_factor={self.low_freq_factor}"
                )


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Sizes and switches of a LLaMA-family model, spelled as in a Hugging Face ``config.json``.

    Args:
        num_key_value_heads: heads of keys and values; None means as many as query heads.
        head_dim: features per head; None means ``hidden_size / num_attention_heads``.
        attention_bias: biases on q, k, v and o (LLaMA's switch).
        qkv_bias: biases on q, k and v alone (Qwen2).
        qk_norm: RMSNorm over each head of q and k before RoPE (Qwen3).
        sliding_window: a token attends to itself and the ``sliding_window - 1`` before it (Mistral); None: to all.
        rope_scaling: frequency scaling; None for plain RoPE.

    Raises:
        ValueError: on a size that is not positive or does not divide as it must.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    qkv_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        for field in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
        ):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 1")
        if self.num_attention_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size={self.hidden_size} must be a multiple of "
                    f"num_attention_heads={self.num_attention_heads}, or head_dim must be given"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.head_size < 2 or self.head_size % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even and at least 2: RoPE turns pairs of features")
        if self.head_size == 2 and self.rope_scaling is not None and self.rope_scaling.rope_type == "dynamic":
            raise ValueError("head_dim=2 must be at least 4 for rope_type='dynamic', which divides by head_dim - 2")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window={self.sliding_window} must be at least 1, or null")

    @property
    def context_limit(self) -> int | None:
        """The most tokens a sample may have; None: no limit.

        It is ``max_position_embeddings``, which for linear and yarn scaling may still be the length before stretching,
        so that the factor comes on top. Dynamic scaling stretches to any length.
        """
        scaling, trained = self.rope_scaling, self.max_position_embeddings
        if scaling is None or scaling.rope_type == "llama3":
            return trained
        if scaling.rope_type == "dynamic":
            return None
        original = trained if scaling.rope_type == "linear" else scaling.original_max_position_embeddings or trained
        return max(trained, int(scaling.factor * original))

    @property
    def num_kv_heads(self) -> int:
        """Heads of keys and values, resolved."""
        assert self.num_key_value_heads is not None
        return self.num_key_value_heads

    @property
    def head_size(self) -> int:
        """Features per head, resolved."""
        assert self.head_dim is not None
        return self.head_dim
