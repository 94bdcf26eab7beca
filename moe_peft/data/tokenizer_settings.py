"""The settings that a Hugging Face folder keeps beside a tokenizer's vocabulary."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from moe_peft.data.tokenizer_parts import SPECIAL_TOKEN_NAMES
from moe_peft.strict import kind, show


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """What the files around a vocabulary say.

    Args:
        named_tokens: ``bos_token``, ``eos_token``, …; None where a file says null, absent where none mentions the name.
        extra_special_tokens: special tokens without a name.
        added_tokens: tokens beyond the vocabulary, or singled out of it, by id.
        eos_token_ids: the ids that end generation, from ``generation_config.json`` or else ``config.json``.
        bos_token_id: from the same file.
        add_bos_token: put the first token before a text; None where no file says.
        add_eos_token: put the end token after a text.
        add_prefix_space: sentencepiece: begin a text with a space.
        legacy: sentencepiece: begin the text after a special token with a space too.
        split_special_tokens: read the text of a special token as plain text.
        chat_template: Jinja source, or None.
    """

    named_tokens: Mapping[str, AddedToken | None]
    extra_special_tokens: tuple[AddedToken, ...]
    added_tokens: Mapping[int, AddedToken]
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    add_bos_token: bool | None
    add_eos_token: bool | None
    add_prefix_space: bool | None
    legacy: bool | None
    split_special_tokens: bool
    chat_template: str | None

    def end_token_ids(self, own: int | None) -> tuple[int, ...]:
        """All ids that end an answer; ``own`` is the vocabulary's end token and comes first."""
        return tuple(dict.fromkeys(([] if own is None else [own]) + list(self.eos_token_ids)))


def read_tokenizer_settings(folder: Path) -> TokenizerSettings:
    """Reads ``tokenizer_config.json`` and its companions; every one of them may be missing.

    Raises:
        ValueError: naming file, key and value, when one cannot be understood.
    """
    path = folder / "tokenizer_config.json"
    config = _read_object(path)
    named: dict[str, AddedToken | None] = {}
    extra: list[AddedToken] = []
    # transformers reads special_tokens_map.json only beside a config of the old shape; a name that the config does not
    # mention at all is taken from there in any case.
    map_path = folder / "special_tokens_map.json"
    special_map = _read_object(map_path)
    sources = [(path, config), (map_path, special_map)]
    if "added_tokens_decoder" not in config:
        sources.reverse()
    for source, mapping in sources:
        for name in SPECIAL_TOKEN_NAMES:
            if name in mapping and name not in named:
                absent = mapping[name] in (None, "")  # both are written for a token that there is not
                named[name] = None if absent else _added_token(mapping[name], f"{source}: {name}")
        extra += _extra_tokens(mapping, source)
    flags = {
        name: _flag(config, name, path)
        for name in ("add_bos_token", "add_eos_token", "add_prefix_space", "legacy", "split_special_tokens")
    }
    eos_token_ids, bos_token_id = _generation_ids(folder)
    return TokenizerSettings(
        named_tokens=named,
        extra_special_tokens=tuple(extra),
        added_tokens=_added_tokens(config, path, folder / "added_tokens.json", {*map(_content, named.values())}),
        eos_token_ids=eos_token_ids,
        bos_token_id=bos_token_id,
        add_bos_token=flags["add_bos_token"],
        add_eos_token=flags["add_eos_token"],
        add_prefix_space=flags["add_prefix_space"],
        legacy=flags["legacy"],
        split_special_tokens=bool(flags["split_special_tokens"]),
        chat_template=_chat_template(config, path, folder / "chat_template.jinja"),
    )


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a mapping, not {kind(value)}")
    return value


def _added_token(value: object, where: str, special: bool = True) -> AddedToken:
    fields: dict[str, Any] = {"special": special}
    if isinstance(value, Mapping):
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        fields |= {flag: bool(value[flag]) for flag in flags if flag in value}
        value = value.get("content")
    if not isinstance(value, str) or not value:
        raise ValueError(f"{where}={show(value)} must be the text of a token")
    return AddedToken(value, **fields)


def _content(token: AddedToken | None) -> str | None:
    return None if token is None else token.content


def _extra_tokens(mapping: Mapping[str, Any], source: Path) -> list[AddedToken]:
    tokens: list[AddedToken] = []
    for name in ("extra_special_tokens", "additional_special_tokens"):
        values = mapping.get(name) or []
        values = list(values.values()) if isinstance(values, Mapping) else values
        if not isinstance(values, list):
            raise ValueError(f"{source}: {name}={show(values)} must be a list, not {kind(values)}")
        tokens += [_added_token(value, f"{source}: {name}") for value in values]
    return tokens


def _added_tokens(
    config: Mapping[str, Any], path: Path, legacy_path: Path, special_contents: set[str | None]
) -> dict[int, AddedToken]:
    entries = config.get("added_tokens_decoder")
    if entries is not None:
        if not isinstance(entries, dict) or not all(key.isdecimal() for key in entries):
            raise ValueError(f"{path}: added_tokens_decoder={show(entries)} must map ids to tokens")
        where = f"{path}: added_tokens_decoder"
        return {int(key): _added_token(value, f"{where}.{key}", special=False) for key, value in entries.items()}
    tokens = {}
    for content, token_id in _read_object(legacy_path).items():
        if not isinstance(token_id, int) or isinstance(token_id, bool):
            raise ValueError(f"{legacy_path}: {content}={show(token_id)} must be an id, not {kind(token_id)}")
        tokens[token_id] = _added_token(content, str(legacy_path), special=content in special_contents)
    return tokens


def _flag(config: Mapping[str, Any], name: str, path: Path) -> bool | None:
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{path}: {name}={show(value)} must be true or false, not {kind(value)}")
    return value


def _generation_ids(folder: Path) -> tuple[tuple[int, ...], int | None]:
    path = folder / "generation_config.json"
    if not path.is_file():
        path = folder / "config.json"
    config = _read_object(path)
    ids: dict[str, list[int]] = {}
    for name in ("eos_token_id", "bos_token_id"):
        value = config.get(name)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) for item in values):
            raise ValueError(f"{path}: {name}={show(value)} must be an id or a list of ids")
        ids[name] = values
    return tuple(ids["eos_token_id"]), next(iter(ids["bos_token_id"]), None)


def _chat_template(config: Mapping[str, Any], path: Path, jinja_path: Path) -> str | None:
    if jinja_path.is_file():
        return jinja_path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, Mapping)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise ValueError(f"{path}: chat_template={show(template)} must be a string, not {kind(template)}")
    return template
