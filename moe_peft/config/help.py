"""The list of all config keys for ``--help``, made from the dataclasses so that it cannot go stale."""

import textwrap
from dataclasses import MISSING, dataclass, fields
from typing import Any, get_type_hints

from moe_peft.adapters import METHODS
from moe_peft.config import TrainConfig
from moe_peft.config.job import AdapterJob
from moe_peft.strict import type_name

# Columns of the help text, and the one where meanings begin.
WIDTH, MEANING_COLUMN = 100, 38


@dataclass(frozen=True, kw_only=True)
class KeyDoc:
    """One config key.

    Args:
        name: the key.
        type: what it takes, in the words of YAML.
        default: its default as YAML would have it; None when the key is required.
        meaning: one line.
    """

    name: str
    type: str
    default: str | None
    meaning: str

    def render(self) -> str:
        """The key on one line where that fits, its meaning wrapped beside it."""
        head = f"  {self.name}: {self.type} " + ("(required)" if self.default is None else f"= {self.default}")
        indent = " " * MEANING_COLUMN
        lines = textwrap.wrap(self.meaning, WIDTH - MEANING_COLUMN) or [""]
        if len(head) + 2 > MEANING_COLUMN:
            return "\n".join([head, *(indent + line for line in lines)]).rstrip()
        return "\n".join([head.ljust(MEANING_COLUMN) + lines[0], *(indent + line for line in lines[1:])]).rstrip()


def describe_keys(cls: type, leave_out: tuple[str, ...] = ()) -> list[KeyDoc]:
    """The keys that a config dataclass takes, in order."""
    hints = get_type_hints(cls)
    return [
        KeyDoc(name=f.name, type=type_name(hints[f.name]), default=_default(f), meaning=f.metadata.get("help", ""))
        for f in fields(cls)
        if f.init and f.name not in leave_out
    ]


def _default(field: Any) -> str | None:
    if field.default_factory is not MISSING:
        return _yaml(field.default_factory())
    return None if field.default is MISSING else _yaml(field.default)


def _yaml(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_yaml(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_yaml(item)}' for key, item in value.items())}}}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def config_reference() -> str:
    """Every key of a config file with its type, default and meaning: the run's, an adapter's, each method's own."""
    methods = {method: describe_keys(config) for method, config in METHODS.items()}
    # Methods share many keys: each stands once, under all the methods that have it.
    shared: dict[tuple[str, ...], list[KeyDoc]] = {}
    for key in dict.fromkeys(key for keys in methods.values() for key in keys):
        shared.setdefault(tuple(method for method, keys in methods.items() if key in keys), []).append(key)
    common = shared.pop(tuple(methods), [])
    defaults = KeyDoc(
        name="defaults",
        type="mapping",
        default="{}",
        meaning="keys given to every adapter whose method and optimizer have them; an adapter's own entry wins",
    )
    sections = {
        "Keys of the run": [*describe_keys(TrainConfig), defaults],
        "Keys of an adapter": describe_keys(AdapterJob, leave_out=("adapter",)),
        "Keys of an adapter, whatever its method": common,
        **{f"Keys of an adapter with method: {', '.join(owners)}": keys for owners, keys in shared.items()},
    }
    return "\n\n".join(
        "\n".join([*textwrap.wrap(f"{title}:", WIDTH), *(key.render() for key in keys)])
        for title, keys in sections.items()
        if keys
    )
