"""Settings that differ from module to module, by PEFT's patterns of paths such as ``model.layers.0.mlp.up_proj``."""

import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from moe_peft import strict
from moe_peft.adapters.method import check_size

V = TypeVar("V")

_PARSER: Any = vars(re).get("_parser") or vars(re)["sre_parse"]  # the latter in Python 3.10
_PATH_LENGTH = 40  # characters: no module's path is longer
_MOST_WAYS = 10**7  # four times ``.*`` are fewer, each next one makes them forty times as many


def value_at(pattern: Mapping[str, V], path: str, default: V) -> V:
    """The value of the first key that is, or as a regular expression matches, the end of a path.

    Args:
        pattern: names or regular expressions, and their values.
        path: a module's, dotted.
        default: where no key matches.
    """
    return next((value for key, value in pattern.items() if _matches(key, path)), default)


@functools.lru_cache(maxsize=10_000)
def _matches(key: str, path: str) -> bool:
    return re.match(_expression(key), path) is not None


def _expression(key: str) -> str:
    return rf"(.*\.)?({key})$"


def check_pattern(field: str, pattern: Mapping[str, float], least: int) -> None:
    """Refuses a pattern with a key that is no regular expression, or takes too long, or a value out of range.

    Args:
        field: its name.
        pattern: its keys and values.
        least: 1 for sizes, which are whole numbers; 0 for any above it.

    Raises:
        ValueError: naming the field and the key.
    """
    for key, value in pattern.items():
        if least:
            check_size(f"{field}[{strict.show(key)}]", int(value))
        elif not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{field}[{key!r}]={value} must be above 0")
        try:
            re.compile(_expression(key))
            ways = _ways(_PARSER.parse(key))
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{field} has {strict.show(key)}, which is no regular expression: {error}") from error
        if ways > _MOST_WAYS:
            raise ValueError(
                f"{field} has {strict.show(key)}, which could take forever to match: it must not repeat what is a "
                "repetition or a choice itself, nor hold many repetitions"
            )


def _ways(parsed: Any) -> int:
    """In how many ways a parsed regular expression may be tried on a path, at most; counted up to the limit."""
    ways = 1
    for operation, argument in parsed:
        ways = min(ways * _ways_of_one(str(operation), argument), _MOST_WAYS + 1)
    return ways


def _ways_of_one(operation: str, argument: Any) -> int:
    if operation.endswith("_REPEAT"):
        least, most, inner = argument
        most = min(int(most), _PATH_LENGTH)
        return max(1, most - int(least) + 1) * _ways(inner) ** most
    if operation == "BRANCH":
        return sum(_ways(inner) for inner in argument[1])
    if operation == "GROUPREF_EXISTS":
        return sum(_ways(inner) for inner in argument[1:] if inner is not None)
    if operation in ("SUBPATTERN", "ASSERT", "ASSERT_NOT"):
        return _ways(argument[-1])
    return _ways(argument) if operation == "ATOMIC_GROUP" else 1


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


def chosen_layers(layers_to_transform: int | tuple[int, ...] | None) -> tuple[int, ...] | None:
    """What ``layers_to_transform`` names; None: all layers."""
    return (layers_to_transform,) if isinstance(layers_to_transform, int) else layers_to_transform


def check_layers(layers: Iterable[int] | None, num_layers: int | None = None) -> None:
    """Refuses ``layers_to_transform`` that are none, named twice, or out of range.

    Args:
        layers: their indices; None: all of them.
        num_layers: of the model; None where it is not known yet.

    Raises:
        ValueError: naming the field, the layer and the rule.
    """
    if layers is None:
        return
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
        layers = list(dict.fromkeys(layers)) or None if all(type(layer) is int for layer in layers) else layers
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
    if patterns and not any(isinstance(one, str) and f".{one}.0." in f".{path}" for one in patterns):
        raise ValueError(f"layers_pattern={pattern!r} must be 'layers', as the layers here are called")
