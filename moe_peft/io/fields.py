"""Typed values out of a model's config, with the field's name in every refusal."""

from collections.abc import Mapping
from typing import Any

from moe_peft.strict import coerce


def read_field(config: Mapping[str, object], name: str, hint: type, default: object = None) -> Any:
    """The field as an ``int``, ``float`` or ``bool``; the default stands for one that is absent or null.

    Raises:
        ValueError: it is of another type, not finite, or absent without a default.
    """
    value = config.get(name)
    return coerce(default if value is None else value, hint, name)
