"""Builds frozen dataclasses from plain mappings by their type hints, refusing whatever does not fit."""

import difflib
import math
import os
import re
import types
from collections.abc import Collection, Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from numbers import Integral, Real
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from moe_peft.frozen_dict import FrozenDict

T = TypeVar("T")

NoneType = type(None)

# YAML 1.1, which PyYAML reads, sees a float only where there is a dot and a signed exponent: 2e-4 arrives as a string.
_EXPONENT_FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


def build(cls: type[T], mapping: object, path: str = "", elsewhere: Mapping[str, str] | None = None) -> T:
    """Returns ``cls(**mapping)`` with every value checked against its field's type hint.

    Args:
        cls: a dataclass whose hints are made of bool, int, float, str, None, Literal, Any, unions, tuples, dataclasses,
            and dictionaries with string keys.
        mapping: plain data as YAML or JSON gives it; a nested dataclass may also be an instance already.
        path: where the mapping stands in its file, such as ``adapters[1]``; put before every field named in an error.
        elsewhere: what to say of a key that is not valid here, but known in another place.

    Raises:
        ValueError: on an unknown key, a missing one, a wrong type, or a value that ``cls`` itself refuses.
    """
    keys = field_names(cls)
    values = check_keys(mapping, keys, path, elsewhere)
    required = [f.name for f in fields(cls) if f.init and f.default is MISSING and f.default_factory is MISSING]  # type: ignore[arg-type]
    for name in required:
        if name not in values:
            raise ValueError(f"{join(path, name)} is missing: it has no default")
    hints = _hints(cls)
    arguments = {name: coerce(value, hints[name], join(path, name)) for name, value in values.items()}
    try:
        return cls(**arguments)
    except ValueError as error:
        raise ValueError(_with_path(str(error), path, keys)) from error


def check_fields(instance: object) -> None:
    """Gives a frozen dataclass built in Python the checks and conversions that a file gets; for ``__post_init__``.

    Raises:
        ValueError: naming the field, its value and its type.
    """
    for name, hint in _hints(type(instance)).items():
        object.__setattr__(instance, name, coerce(getattr(instance, name), hint, name))


def check_keys(
    mapping: object, valid: Collection[str], path: str, elsewhere: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Returns ``mapping`` as a dict once every key is known to be one of ``valid``.

    Raises:
        ValueError: when it is no mapping, or on the first unknown key, with the nearest valid one.
    """
    if not isinstance(mapping, Mapping):
        subject = f"{path}={show(mapping)}" if path else "the top level"
        raise ValueError(f"{subject} must be a mapping of keys to values, not {kind(mapping)}")
    for key, value in mapping.items():
        if key in valid:
            continue
        if not isinstance(key, str):
            raise ValueError(f"{path or 'the top level'} has the key {show(key)} ({kind(key)}): keys are strings")
        remark = (elsewhere or {}).get(key)
        remark = f": {remark}" if remark else nearest(key, valid)
        raise ValueError(f"{join(path, key)}={show(value)} is not a known key{remark}")
    return dict(mapping)


def coerce(value: object, hint: Any, path: str, expected: str | None = None) -> Any:
    """Returns ``value`` as ``hint`` wants it, or refuses it.

    The only conversions: int to float, a string such as ``2e-4`` to float, list to tuple, mapping to dataclass or to a
    dictionary that cannot change, and (in Python, never from a file) ``os.PathLike`` to str and numpy's scalars to
    Python's.

    Args:
        expected: what the error says was wanted, where that is more than ``hint``.

    Raises:
        ValueError: naming ``path``, the value and the type wanted.
    """
    origin = get_origin(hint)
    refusal = f"{path}={show(value)} must be {expected or type_name(hint)}, not {kind(value)}"
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _coerce_union(value, get_args(hint), path, type_name(hint))
    if origin is Literal:
        return _coerce_literal(value, get_args(hint), path, expected or f"one of {', '.join(map(str, get_args(hint)))}")
    if origin is tuple:
        return _coerce_tuple(value, get_args(hint), path, refusal)
    if origin is dict:
        return _coerce_dict(value, get_args(hint)[1], path, refusal)
    if is_dataclass(hint):
        if isinstance(value, hint):  # type: ignore[arg-type]
            return value
        from_dict = getattr(hint, "from_dict", None)
        return from_dict(value, path) if from_dict else build(hint, value, path)  # type: ignore[arg-type]
    return _coerce_scalar(value, hint, path, refusal)


def _coerce_scalar(value: object, hint: Any, path: str, refusal: str) -> Any:
    if hint is NoneType and value is None:
        return None
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    if hint is float and not isinstance(value, bool):
        if isinstance(value, Real):
            return _finite(value, path)
        if isinstance(value, str) and _EXPONENT_FLOAT.fullmatch(value):
            return _finite(value, path)
    if hint is str:
        if isinstance(value, str):
            return value
        if isinstance(value, os.PathLike):
            return os.fspath(value)
        if value is not None and not isinstance(value, (list, tuple, Mapping)):
            refusal += " (put it in quotes)"
    assert hint in (NoneType, bool, int, float, str), f"{path}: {hint} is not a hint that strict knows"
    raise ValueError(refusal)


def _finite(value: Any, path: str) -> float:
    try:
        number = float(value)
    except OverflowError:  # an int of more than 308 digits
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{path}={show(value)} must be a finite number")
    return number


def _coerce_literal(value: object, choices: tuple[object, ...], path: str, expected: str) -> object:
    for choice in choices:
        if type(choice) is type(value) and choice == value:  # 1 == True, but neither means the other
            return choice
    raise ValueError(f"{path}={show(value)} must be {expected}{did_you_mean(value, choices)}")


def _coerce_tuple(value: object, members: tuple[Any, ...], path: str, refusal: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(refusal)
    if members[-1] is Ellipsis:
        members = (members[0],) * len(value)
    if len(members) != len(value):
        raise ValueError(f"{path}={show(value)} must hold {len(members)} values, not {len(value)}")
    return tuple(
        coerce(item, member, f"{path}[{index}]")
        for index, (item, member) in enumerate(zip(value, members, strict=True))
    )


def _coerce_dict(value: object, member: Any, path: str, refusal: str) -> FrozenDict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(refusal)
    for key in value:
        if not isinstance(key, str):
            raise ValueError(f"{path} has the key {show(key)} ({kind(key)}): keys are strings")
    return FrozenDict({key: coerce(item, member, f"{path}[{show(key)}]") for key, item in value.items()})


def _coerce_union(value: object, members: tuple[Any, ...], path: str, expected: str) -> Any:
    if value is None and NoneType in members:
        return None
    if isinstance(value, str) and str in members:
        return value
    # Only the members of the value's own kind can take it; where there is one, its error says most.
    if isinstance(value, (list, tuple)):
        members = tuple(member for member in members if get_origin(member) is tuple)
    elif isinstance(value, Mapping):
        members = tuple(member for member in members if is_dataclass(member) or get_origin(member) is dict)
    else:
        members = tuple(
            member for member in members if member is not NoneType and get_origin(member) not in (tuple, dict)
        )
    if len(members) == 1:
        return coerce(value, members[0], path, expected)
    choices: list[object] = []
    for member in members:
        choices += get_args(member) if get_origin(member) is Literal else ()
        try:
            return coerce(value, member, path)
        except ValueError:
            continue
    raise ValueError(f"{path}={show(value)} must be {expected}, not {kind(value)}{did_you_mean(value, choices)}")


def did_you_mean(value: object, valid: Iterable[object]) -> str:
    """What to add to an error about an unknown name: the nearest valid one, or nothing where none is near."""
    # Case aside, so that LR finds lr.
    by_lower = {name.lower(): name for name in valid if isinstance(name, str)}
    close = difflib.get_close_matches(value.lower(), list(by_lower), n=1) if isinstance(value, str) else []
    return f"; did you mean {by_lower[close[0]]!r}?" if close else ""


def nearest(name: str, valid: Collection[str]) -> str:
    """As :func:`did_you_mean`, and where none is near, all the valid ones."""
    return did_you_mean(name, valid) or (f"; valid here: {', '.join(sorted(valid))}" if valid else "")


def plain(value: object) -> Any:
    """Returns a dataclass as plain data that :func:`build` reads back: dicts, lists and scalars."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value) if f.init}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value


def field_names(cls: type) -> tuple[str, ...]:
    """The keys that :func:`build` takes for ``cls``, in order."""
    return tuple(f.name for f in fields(cls) if f.init)


def join(path: str, name: str) -> str:
    """``adapters[1]`` and ``lr`` to ``adapters[1].lr``."""
    return f"{path}.{name}" if path else name


def _with_path(message: str, path: str, keys: Collection[str]) -> str:
    if not path:
        return message
    subject = re.match(r"\w+", message)
    # A refusal that begins with its field reads on from the path; any other sentence stands after it.
    return f"{path}.{message}" if subject and subject[0] in keys else f"{path}: {message}"


def _hints(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {name: hints[name] for name in field_names(cls)}


_SCALAR_NAMES: dict[Any, str] = {NoneType: "null", bool: "bool", int: "int", float: "float", str: "str", Any: "any"}


def type_name(hint: Any) -> str:
    """A type hint as a reader of YAML would say it: ``int | null``, ``list of str``, ``error | skip``."""
    origin, members = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " | ".join(type_name(member) for member in members)
    if origin is Literal:
        return " | ".join(str(choice) for choice in members)
    if origin is tuple:
        if members[-1] is Ellipsis:
            return f"list of {type_name(members[0])}"
        return f"[{', '.join(type_name(member) for member in members)}]"
    if origin is dict:
        return f"mapping of {type_name(members[0])} to {type_name(members[1])}"
    return _SCALAR_NAMES.get(hint, "mapping")


def kind(value: object) -> str:
    """The type of a value in the words of :func:`type_name`."""
    if isinstance(value, (list, tuple)):
        return "list"
    if isinstance(value, Mapping):
        return "mapping"
    return _SCALAR_NAMES.get(type(value), type(value).__name__)


def show(value: object) -> str:
    """``repr``, cut where it would bury the message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
