"""Writes ``key=value`` overrides into a config's plain data."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from moe_peft.config.file import parse_yaml
from moe_peft.strict import kind, nearest, show


@dataclass(frozen=True, kw_only=True)
class KnownKeys:
    """Where a path of keys can lead.

    Args:
        of_run: the keys of the top level.
        of_adapter: gives the keys that an adapter's entry may have; of None, those of any method.
    """

    of_run: Collection[str]
    of_adapter: Callable[[Mapping[str, Any] | None], Collection[str]]


def apply_overrides(data: dict[str, Any], overrides: Sequence[str], known: KnownKeys) -> None:
    """Writes ``key=value`` overrides into a config's plain data, in order.

    ``seed=1`` sets a key of the run, ``defaults.lr=1e-4`` one of the defaults, ``adapters.qa.lr=1e-4`` (by name),
    ``adapters.0.lr=1e-4`` or ``adapters[0].lr=1e-4`` one adapter's, and ``adapters.*.lr=1e-4`` that of every adapter
    whose method has the key. A name wins over an index. A value is read as YAML.

    Args:
        data: changed in place.

    Raises:
        ValueError: on a malformed override or a path that leads nowhere.
    """
    for override in overrides:
        keys, value = parse_override(override)
        try:
            _set(data, keys, value, known)
        except ValueError as error:
            raise ValueError(f"override {override!r}: {error}") from error


def parse_override(override: str) -> tuple[list[str], Any]:
    """Splits ``adapters[0].lr=1e-4`` into its path and its value: ``["adapters", "0", "lr"]`` and the YAML value.

    Raises:
        ValueError: without ``=``, with an empty or odd key, or with a value that is not YAML.
    """
    key, equals, text = override.partition("=")
    if not equals:
        raise ValueError(f"override {override!r} must be written key=value, as in max_batch_tokens=2048")
    parts = re.sub(r"\[(\d+|\*)\]", r".\1", key).split(".")
    if not all(re.fullmatch(r"[A-Za-z0-9_-]+|\*", part) for part in parts):
        raise ValueError(f"override {override!r}: the key must be names joined by dots, as in adapters.qa.lr=1e-4")
    try:
        return parts, parse_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = getattr(error, "problem", None) or error
        raise ValueError(f"override {override!r}: the value is not valid YAML: {reason}") from error


def _set(data: dict[str, Any], keys: list[str], value: Any, known: KnownKeys) -> None:
    first, last = keys[0], keys[-1]
    if first not in known.of_run:
        if first in known.of_adapter(None):
            raise ValueError(f"{first} is a key of an adapter: write adapters.*.{first}= or adapters.NAME.{first}=")
        raise ValueError(f"{first!r} is not a key of the run{nearest(first, known.of_run)}")
    if len(keys) == 1:
        data[first] = value
        return
    depth = {"defaults": 2, "adapters": 3}.get(first, 1)
    if len(keys) != depth:
        shape = {1: first, 2: "defaults.KEY", 3: "adapters.NAME.KEY"}[depth]
        raise ValueError(f"{'.'.join(keys)!r} must be written {shape}=value")
    if last not in known.of_adapter(None):
        raise ValueError(f"{last!r} is not a key of an adapter{nearest(last, known.of_adapter(None))}")
    if first == "defaults":
        defaults = data.get("defaults") or {}
        if not isinstance(defaults, dict):
            raise ValueError(f"defaults={show(defaults)} must be a mapping of keys to values, not {kind(defaults)}")
        data["defaults"] = {**defaults, last: value}
        return
    for entry in _selected(data.get("adapters"), keys[1], last, known):
        entry[last] = value


def _selected(entries: Any, selector: str, key: str, known: KnownKeys) -> list[dict[str, Any]]:
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError("adapters must be a list of mappings before one of them can be overridden")
    if selector == "*":
        able = [entry for entry in entries if key in known.of_adapter(entry)]
        if not able:
            raise ValueError(f"no adapter here has a method with the key {key!r}")
        return able
    named = [entry for entry in entries if entry.get("name") == selector]
    if named:
        return named
    if selector.isdigit():
        if int(selector) >= len(entries):
            raise ValueError(f"adapters has {len(entries)} entries, counted from 0: there is no adapters.{selector}")
        return [entries[int(selector)]]
    names = [str(entry["name"]) for entry in entries if "name" in entry]
    raise ValueError(f"there is no adapter named {selector!r}{nearest(selector, names)}")
