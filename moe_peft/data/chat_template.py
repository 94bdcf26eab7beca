"""Renders chat templates, which are code from a stranger's file, in a sandbox."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    special_tokens: Mapping[str, str],
    add_generation_prompt: bool = False,
) -> str:
    """Returns the text of a conversation, as transformers renders it.

    Args:
        template: Jinja source.
        messages: ``role`` and ``content`` of every turn; other keys reach the template as they are.
        special_tokens: ``bos_token``, ``eos_token``, … for the template to write.
        add_generation_prompt: end with the opening of an assistant turn.

    Raises:
        ValueError: when the messages are no JSON data, or the template does not compile, or fails, or refuses the
            conversation through its own ``raise_exception``.
    """
    try:
        # A template sees plain data only, never objects whose methods the sandbox cannot know. Keys without a value
        # are dropped: many templates test for the key and would write "None".
        turns = json.loads(json.dumps([{k: v for k, v in turn.items() if v is not None} for turn in messages]))
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"messages must be a list of mappings of plain data: {error}") from error
    try:
        return _compile(template).render(
            messages=turns,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **special_tokens,
        )
    except TemplateError as error:
        raise ValueError(f"the chat template refused the conversation: {error}") from error
    except Exception as error:  # a stranger's template may fail in any way at all
        raise ValueError(f"the chat template failed with {type(error).__name__}: {error}") from error


@lru_cache(maxsize=16)
def _compile(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["namespace"] = _Namespace
    try:
        return environment.from_string(template)
    except TemplateSyntaxError as error:
        raise ValueError(f"the chat template does not compile: line {error.lineno}: {error.message}") from error


class _GenerationTag(Extension):
    """``{% generation %}…{% endgeneration %}`` marks an answer for transformers; its inside is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _Namespace(Namespace):
    """Jinja's namespace without underscore names, which would lead into Python's own machinery."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, initial = args[0], dict(*args[1:], **kwargs)
        for name in initial:
            _check_attribute(name)
        Namespace.__init__(self, initial)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        Namespace.__setitem__(self, name, value)


def _check_attribute(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace may not hold {name!r}: it begins with an underscore")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which has no place in a prompt.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
