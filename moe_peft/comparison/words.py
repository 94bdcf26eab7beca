"""Methods as the words of a command line name them: ``lora r=16 mixlora:num_experts=4 config.yaml``."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moe_peft import strict
from moe_peft.adapters import METHODS, Method
from moe_peft.comparison.compare import describe
from moe_peft.config import TrainConfig
from moe_peft.config.job import check_method
from moe_peft.config.overrides import parse_override

CONFIG_SUFFIXES = (".yaml", ".yml", ".json")


def read_methods(words: Sequence[str]) -> dict[str, Method]:
    """The methods that the words name, by what the table is to call them.

    Args:
        words: each the name of a method; ``key=value``, a setting of the method before it; both in one, as in
            ``lora:r=16,lora_alpha=32``; or a config of a run, whose adapters are meant.

    Returns:
        All methods of the registry with their defaults where there are no words.

    Raises:
        FileNotFoundError: when there is no such config.
        ValueError: on what is none of these, a setting that the method does not have, or one name twice.
    """
    named: dict[str, Method] = {}
    for name, config in _read(words):
        if name in named:
            raise ValueError(f"{name!r} is named twice: every row of the table needs a name of its own")
        named[name] = config
    return named or {name: method() for name, method in METHODS.items()}


def _read(words: Sequence[str]) -> Iterator[tuple[str, Method]]:
    method, settings = "", dict[str, Any]()
    for word in words:
        head, _, tail = word.partition(":")
        if "=" in head:
            if not method:
                raise ValueError(f"{word!r} is a setting without a method: write it behind one, as in lora r=16")
            _set(settings, word, method)
            continue
        if method:
            yield _built(method, settings)
        method, settings = "", {}
        if word.endswith(CONFIG_SUFFIXES):
            yield from ((job.name, job.adapter) for job in TrainConfig.from_file(Path(word)).adapters)
            continue
        _check(head)
        method = head
        for setting in _apart(tail):
            _set(settings, setting, method)
    if method:
        yield _built(method, settings)


def _check(method: str) -> None:
    try:
        check_method(method)
    except ValueError as error:
        raise ValueError(f"{error}; or a config file ({', '.join(CONFIG_SUFFIXES)})") from error


def _built(method: str, settings: dict[str, Any]) -> tuple[str, Method]:
    config: Method = strict.build(METHODS[method], settings, method)
    return describe(config), config


def _set(settings: dict[str, Any], word: str, method: str) -> None:
    keys, value = parse_override(word)
    *outer, last = keys
    inner = settings
    for key in outer:
        inner = inner.setdefault(key, {})
        if not isinstance(inner, dict):
            raise ValueError(f"{word!r} sets a part of {method}.{key}, which is set to {strict.show(inner)} already")
    if last in inner:
        path = ".".join([method, *keys])
        raise ValueError(f"{path} is set twice: to {strict.show(inner[last])} and to {strict.show(value)}")
    inner[last] = value


def _apart(text: str) -> Iterator[str]:
    """``r=8,target_modules=[q_proj,v_proj]`` at the commas outside of brackets."""
    depth, start = 0, 0
    for i, letter in enumerate(text):
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            yield text[start:i]
            start = i + 1
    if text:
        yield text[start:]
