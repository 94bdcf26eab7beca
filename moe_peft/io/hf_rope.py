"""RoPE as a Hugging Face config spells it: ``rope_scaling`` and ``rope_theta``, or ``rope_parameters``.

Defaults and precedence are those of transformers 5 (``modeling_rope_utils.py``).
"""

from collections.abc import Mapping

from moe_peft.io.fields import read_field
from moe_peft.model.config import ROPE_TYPES, RopeScaling
from moe_peft.strict import did_you_mean

_DEFAULT_THETA = 10000.0
_DEFAULT_BETA_FAST = 32.0
_DEFAULT_BETA_SLOW = 1.0
_REQUIRED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),
}


def read_rope(config: Mapping[str, object], max_position_embeddings: int) -> tuple[float, RopeScaling | None]:
    """The RoPE base and scaling of a config.

    Raises:
        ValueError: on a scaling kind that is not supported, a missing or mistyped value, or one out of range.
    """
    # rope_scaling wins over rope_parameters, and a rope_theta inside over the one outside.
    spelling = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    parameters = config.get(spelling) or {}
    if not isinstance(parameters, Mapping):
        raise ValueError(f"{spelling}={parameters!r} must be an object or null")
    _refuse_uneven(config, parameters, spelling)
    theta = read_field(parameters, "rope_theta", float, read_field(config, "rope_theta", float, _DEFAULT_THETA))
    if theta <= 0:
        raise ValueError(f"rope_theta={theta} must be positive")
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    if rope_type == "default":
        return theta, None
    valid = ("default", *ROPE_TYPES)
    if rope_type not in valid:
        raise ValueError(
            f"rope_type={rope_type!r} in {spelling} is not supported: it must be one of {', '.join(valid)}"
            f"{did_you_mean(rope_type, valid)}"
        )
    for name in _REQUIRED[str(rope_type)]:
        if parameters.get(name) is None:
            raise ValueError(f"{spelling} of rope_type={rope_type!r} needs {name}")
    return theta, _scaling(str(rope_type), parameters, config, max_position_embeddings)


def _scaling(
    rope_type: str, parameters: Mapping[str, object], config: Mapping[str, object], max_position_embeddings: int
) -> RopeScaling:
    def number(name: str, default: float | None = None) -> float:
        value: float = read_field(parameters, name, float, default)
        return value

    def optional(name: str) -> float | None:
        return None if parameters.get(name) is None else number(name)

    if rope_type in ("linear", "dynamic"):
        return RopeScaling(rope_type=rope_type, factor=number("factor"))
    # Phi's spelling, outside the scaling, wins; without either the model was trained at its full length.
    inner = read_field(parameters, "original_max_position_embeddings", int, max_position_embeddings)
    original = read_field(config, "original_max_position_embeddings", int, inner)
    if original < 1:
        raise ValueError(f"original_max_position_embeddings={original} must be at least 1")
    if rope_type == "llama3":
        return RopeScaling(
            rope_type=rope_type,
            factor=number("factor"),
            original_max_position_embeddings=original,
            low_freq_factor=number("low_freq_factor"),
            high_freq_factor=number("high_freq_factor"),
        )
    return RopeScaling(
        rope_type=rope_type,
        factor=number("factor", max_position_embeddings / original),
        original_max_position_embeddings=original,
        beta_fast=number("beta_fast", 0.0) or _DEFAULT_BETA_FAST,
        beta_slow=number("beta_slow", 0.0) or _DEFAULT_BETA_SLOW,
        attention_factor=optional("attention_factor"),
        mscale=optional("mscale"),
        mscale_all_dim=optional("mscale_all_dim"),
        truncate=read_field(parameters, "truncate", bool, True),
    )


def _refuse_uneven(config: Mapping[str, object], parameters: Mapping[str, object], spelling: str) -> None:
    """Refuse RoPE that differs between layers, or turns some of a head's features only."""
    for name, value in parameters.items():
        if isinstance(value, Mapping):
            raise ValueError(f"{spelling} with a part of its own for {name!r} is not supported: it must be uniform")
    for place in (parameters, config):
        if place.get("partial_rotary_factor") not in (None, 1):
            raise ValueError(f"partial_rotary_factor={place['partial_rotary_factor']!r} is not supported: it must be 1")
    if parameters.get("mrope_section") is not None:
        raise ValueError(f"mrope_section={parameters['mrope_section']!r} is not supported: it must be absent")
