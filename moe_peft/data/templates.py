"""Prompt templates: what stands around an instruction and its input."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from moe_peft.strict import check_keys, kind, nearest, show

CHAT = "chat"
_FOLDER = Path(__file__).parent / "templates"
_PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}")
# Which placeholders each text must have, and may have.
_FIELDS = {"prompt_input": ("instruction", "input"), "prompt_no_input": ("instruction",)}
# What a template file of the original MoE-PEFT has beside them; neither changes a prompt.
_INFORMATIVE = ("description", "response_split")


@dataclass(frozen=True, kw_only=True)
class Template:
    """How an instruction and its input become a prompt.

    Args:
        name: a built-in name, or the path of the user's file.
        prompt_input: the prompt of a record with an input, with ``{instruction}`` and ``{input}``.
        prompt_no_input: the prompt of a record without one, with ``{instruction}``.
        is_chat: the prompt is a user's turn, to be put through the tokenizer's chat template.

    Raises:
        ValueError: when a placeholder is missing or unknown.
    """

    name: str
    prompt_input: str
    prompt_no_input: str
    is_chat: bool = False

    def __post_init__(self) -> None:
        for key, wanted in _FIELDS.items():
            _check_placeholders(key, getattr(self, key), wanted)

    def prompt(self, instruction: str, input: str = "") -> str:
        """Returns the prompt; braces in the data stay as they are, and an input of nothing but white space is none."""
        values = {"instruction": instruction, "input": input}
        text = self.prompt_input if input.strip() else self.prompt_no_input
        # One pass over the template alone: what is put in is never looked at again.
        return _PLACEHOLDER.sub(lambda match: values[match[1]], text)


def _check_placeholders(key: str, text: object, wanted: tuple[str, ...]) -> None:
    if not isinstance(text, str):
        raise ValueError(f"{key}={show(text)} must be a string, not {kind(text)}")
    if doubled := re.search(r"\{\{\s*(\w+)\s*\}\}", text):
        raise ValueError(f"{key} has {doubled[0]}: a placeholder has single braces, {{{doubled[1]}}}")
    found = _PLACEHOLDER.findall(text)
    for name in found:
        if name not in wanted:
            remark = "; a record that comes here has no input" if name == "input" else nearest(name, wanted)
            raise ValueError(f"{key} has the placeholder {{{name}}}, which is not known here{remark}")
    for name in wanted:
        if name not in found:
            raise ValueError(f"{key} must have the placeholder {{{name}}}")


def builtin_templates() -> tuple[str, ...]:
    """The names that ``load_template`` knows."""
    return (*sorted(path.stem for path in _FOLDER.glob("*.yaml")), CHAT)


def load_template(name_or_path: str | Path) -> Template:
    """Returns a template.

    Args:
        name_or_path: ``alpaca``, ``moe_peft``, ``chat`` (the instruction as a user's turn, through the tokenizer's chat
            template), or a YAML or JSON file with the keys ``prompt_input`` and ``prompt_no_input``.

    Raises:
        ValueError: on an unknown name, or a file with unknown, missing or wrong keys and placeholders; names the file.
    """
    name = str(name_or_path)
    if name == CHAT:
        return Template(
            name=CHAT, prompt_input="{instruction}\n\n{input}", prompt_no_input="{instruction}", is_chat=True
        )
    path = _FOLDER / f"{name}.yaml" if name in builtin_templates() else Path(name).expanduser()
    if not path.is_file():
        raise ValueError(
            f"template={name!r} is neither a built-in template nor an existing file{nearest(name, builtin_templates())}"
        )
    try:
        values = check_keys(_read_mapping(path), (*_FIELDS, *_INFORMATIVE), "")
        if missing := next((key for key in _FIELDS if key not in values), None):
            raise ValueError(f"{missing} is missing")
        return Template(name=name, **{key: values[key] for key in _FIELDS})
    except ValueError as error:
        raise ValueError(f"the template file {path}: {error}") from error


def _read_mapping(path: Path) -> Mapping[str, object]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        value = json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"not valid {'JSON' if path.suffix.lower() == '.json' else 'YAML'}: {error}") from error
    if not isinstance(value, Mapping):
        raise ValueError(f"must hold the keys {' and '.join(_FIELDS)}, not a {kind(value)}")
    return value
