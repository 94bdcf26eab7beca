"""Settings that differ from module to module, by PEFT's patterns of paths such as ``model.layers.0.mlp.up_proj``."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from moe_peft import strict

V = TypeVar("V")


def value_at(pattern: Mapping[str, V], path: str, default: V) -> V:
    """The value of the first key that is, or as a regular expression matches, the end of a path.

    Args:
        pattern: names or regular expressions, and their values.
        path: a module's, dotted.
        default: where no key matches.
    """
    return next((value for key, value in pattern.items() if re.match(_expression(key), path)), default)


def _expression(key: str) -> str:
    return rf"(.*\.)?({key})$"


def check_pattern(field: str, pattern: Mapping[str, float], least: int) -> None:
    """Refuses a pattern with a key that is no regular expression, or a value out of range.

    Args:
        field: its name.
        pattern: its keys and values.
        least: 1 for whole numbers from there on; 0 for any above it.

    Raises:
        ValueError: naming the field and the key.
    """
    for key, value in pattern.items():
        if not (value >= least if least else value > 0) or not math.isfinite(value):
            rule = f"at least {least}" if least else "above 0"
            raise ValueError(f"{field}[{key!r}]={value} must be {rule}")
        try:
            re.compile(_expression(key))
        except re.error as error:
            raise ValueError(f"{field} has {key!r}, which is no regular expression: {error}") from error


def check_matches(field: str, pattern: Mapping[str, object], paths: Sequence[str]) -> None:
    """Refuses a key that matches none of the modules that an adapter is on.

    Raises:
        ValueError: naming the field, the key and the nearest module's name.
    """
    for key in pattern:
        expression = re.compile(_expression(key))
        if not any(expression.match(path) for path in paths):
            close = strict.nearest(key, {path.rpartition(".")[2] for path in paths})
            raise ValueError(f"{field} has {key!r}, which matches no module that the adapter is on{close}")


def check_layers(layers: Iterable[int], num_layers: int | None = None) -> None:
    """Refuses ``layers_to_transform`` that are none, named twice, or out of range.

    Args:
        layers: their indices.
        num_layers: of the model; None where it is not known yet.

    Raises:
        ValueError: naming the field, the layer and the rule.
    """
    layers = list(layers)
    if not layers:
        raise ValueError("layers_to_transform=[] must name at least one layer, or be null: all of them")
    if len(set(layers)) < len(layers):
        raise ValueError(f"layers_to_transform={layers} names a layer twice")
    for layer in layers:
        if layer < 0 or (num_layers is not None and layer >= num_layers):
            rule = "at least 0" if num_layers is None else f"in 0..{num_layers - 1}: num_hidden_layers={num_layers}"
            raise ValueError(f"layers_to_transform has {layer}, which must be {rule}")


def layers_of_folder(data: Mapping[str, Any], path: str) -> Any:
    """A PEFT folder's ``layers_to_transform``: an empty list chooses all layers, a repetition chooses nothing more.

    Args:
        data: the folder's settings.
        path: a module's in layer 0.

    Raises:
        ValueError: on a ``layers_pattern`` of another architecture.
    """
    layers = data.get("layers_to_transform")
    if isinstance(layers, list):
        layers = list(dict.fromkeys(layers)) or None
    if layers is not None:
        check_layers_pattern(data.get("layers_pattern"), path)
    return layers


def check_layers_pattern(pattern: object, path: str) -> None:
    """Refuses a ``layers_pattern`` of another architecture, under which ``layers_to_transform`` would choose no layer.

    Args:
        pattern: a name or a list of names of the module that holds the layers; what is empty fits any.
        path: a module's in layer 0.

    Raises:
        ValueError: naming the field.
    """
    patterns = pattern if isinstance(pattern, list) else [pattern] if pattern else []
    if patterns and not any(isinstance(one, str) and re.match(rf"(?:^|.*?\.){one}\.0\.", path) for one in patterns):
        raise ValueError(f"layers_pattern={pattern!r} must be 'layers', as the layers here are called")
