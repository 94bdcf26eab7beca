"""Reads a config file into plain data, before any key is known to be right."""

import difflib
import json
from pathlib import Path
from typing import Any

import yaml

from moe_peft.strict import kind


def read_mapping(path: str | Path) -> dict[str, Any]:
    """Returns the mapping that a YAML or (by the suffix ``.json``) JSON file holds.

    Raises:
        FileNotFoundError: when there is no such file, with the nearest name beside it.
        ValueError: when it cannot be read, is malformed, is empty, is no mapping, or says one key twice.
    """
    path = Path(path)
    if not path.exists():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, siblings, n=1)
        hint = f"; did you mean '{path.parent / close[0]}'?" if close else ""
        raise FileNotFoundError(f"config file '{path}' does not exist{hint}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ValueError(f"config file '{path}' cannot be read: {reason}") from error
    return parse_mapping(text, source=str(path), is_json=path.suffix.lower() == ".json")


def parse_mapping(text: str, *, source: str, is_json: bool = False) -> dict[str, Any]:
    """Returns the mapping that ``text`` holds; ``source`` names it in errors.

    Raises:
        ValueError: as :func:`read_mapping`.
    """
    try:
        data = _parse_json(text) if is_json else parse_yaml(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source}:{error.lineno}: not valid JSON: {error.msg}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{source}{_yaml_reason(error)}") from error
    except RecursionError as error:
        raise ValueError(f"{source}: nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    if data is None:
        raise ValueError(f"{source}: the file is empty; a config needs at least base_model and adapters")
    if not isinstance(data, dict):
        raise ValueError(f"{source}: the top level must be a mapping of keys to values, not {kind(data)}")
    return data


def _parse_json(text: str) -> Any:
    def refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"the key {key!r} stands twice in one mapping")
        return dict(pairs)

    def refuse_constant(name: str) -> Any:
        raise ValueError(f"{name} is not a JSON number")

    return json.loads(text, object_pairs_hook=refuse_twice, parse_constant=refuse_constant) if text.strip() else None


class _Loader(yaml.SafeLoader):
    """``yaml.SafeLoader`` that refuses what YAML itself forbids and PyYAML lets pass: one key twice in a mapping."""

    # Where mappings are composed, not where they are constructed: by then PyYAML may have merged keys (<<) into them.
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            identity = (key.tag, key.value)
            if identity in lines:
                problem = f"the key {key.value!r} stands twice in one mapping, first on line {lines[identity]}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            lines[identity] = key.start_mark.line + 1
        return node


def parse_yaml(text: str) -> Any:
    """Returns the plain data that YAML text holds.

    Raises:
        yaml.YAMLError: on malformed YAML, and on a key that stands twice in one mapping.
        ValueError: on a scalar out of its type's range, such as a 13th month.
    """
    return yaml.load(text, Loader=_Loader)  # a SafeLoader: plain data only


def _yaml_reason(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f":{mark.line + 1}: not valid YAML: {problem}" if mark else f": not valid YAML: {problem}"
