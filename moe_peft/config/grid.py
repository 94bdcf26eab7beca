"""The grid of entries that an adapter's entry with lists stands for, and their names."""

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import PurePath
from typing import Any, get_args, get_origin, get_type_hints

from moe_peft import strict
from moe_peft.adapters import METHODS
from moe_peft.config.job import LONGEST_NAME, OPTIMIZER_KEYS, AdapterJob, adapter_keys

# More are a slip, such as one zero too many in a generated list, and would take minutes to build.
MAX_MEMBERS = 1000

# Keys that decide which others mean something; they vary slowest.
HEADS = ("method", "optimizer")
# Keys whose values say in a name what they are without the key before them.
SPEAKING = ("method", "optimizer", "lr_scheduler")
# Keys that every member shares, and why.
NOT_SWEPT = {
    "name": "each member gets its own from it",
    "eval_data": "members are compared on the same held-out records",
}
# A name gives the place in its list of a value that takes more characters.
LONGEST_VALUE = 32


def means_something(key: str, method: object, optimizer: object) -> bool:
    """Whether an adapter of this method with this optimizer reads the key at all."""
    if key == "decay_router" and isinstance(method, str) and method in METHODS:
        return METHODS[method].has_router
    return key in adapter_keys(method) and OPTIMIZER_KEYS.get(key, optimizer) == optimizer


def _hint(key: str) -> Any:
    classes: list[type] = [AdapterJob, *METHODS.values()]
    for cls in classes:
        if key in strict.field_names(cls):
            return get_type_hints(cls)[key]
    raise AssertionError(f"{key} is no key of an adapter")


def _is_list_of_values(key: str, value: object) -> bool:
    """Whether the value is a list to sweep over; of a key whose own value is a list, a list with a list in it."""
    if key not in adapter_keys(None) or key == "sweep" or not isinstance(value, (list, tuple)):
        return False
    hint = _hint(key)
    takes_list = any(get_origin(member) is tuple for member in (hint, *get_args(hint)))
    return not takes_list or any(isinstance(item, (list, tuple)) for item in value)


def lists_of(entry: Mapping[str, Any]) -> dict[str, Sequence[Any]]:
    """The keys of an entry that hold a list to sweep over."""
    return {key: value for key, value in entry.items() if _is_list_of_values(key, value)}


def heads_of(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every combination of the entry's method and optimizer, each of them one value or a list."""
    given = {"method": entry.get("method"), "optimizer": entry.get("optimizer", "adamw")}
    columns = [given[key] if _is_list_of_values(key, given[key]) else [given[key]] for key in HEADS]
    return [dict(zip(HEADS, values, strict=True)) for values in itertools.product(*columns)]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One member of a grid.

    Args:
        values: its entry, without lists to sweep.
        chosen: the place of each swept key's value in its list, in the order of the name.
    """

    values: dict[str, Any]
    chosen: dict[str, int]


class Grid:
    """An adapter's entry with lists: ``lr: [1e-4, 2e-4]`` and ``seed: [0, 1]`` are four points.

    A key that only some of the swept methods or optimizers read varies for those and is left out of the others.

    Args:
        entry: the entry as a file has it.
        path: where it stands in its file, for errors.

    Raises:
        ValueError: on an empty list, a value that stands in its list twice or has a wrong type, a key that cannot be
            swept, or too many points.
    """

    def __init__(self, entry: Mapping[str, Any], path: str) -> None:
        self.path = path
        self._entry = dict(entry)
        self.lists = {key: self._read_list(key, values) for key, values in lists_of(entry).items()}
        self.points = list(self._points()) if self.lists else [Point(values=self._entry, chosen={})]

    def _read_list(self, key: str, given: Sequence[Any]) -> tuple[Any, ...]:
        where = strict.join(self.path, key)
        if key in NOT_SWEPT:
            raise ValueError(f"{where}={strict.show(given)} must be one value, not a list: {NOT_SWEPT[key]}")
        if not given:
            raise ValueError(f"{where}=[] must hold at least one value to sweep over")
        hint = _hint(key)
        values = [strict.coerce(value, hint, f"{where}[{index}]") for index, value in enumerate(given)]
        first: dict[tuple[type, Any], int] = {}  # with the type: 1 and true are two values
        for index, value in enumerate(values):
            earlier = first.setdefault((type(value), value), index)
            if earlier != index:
                raise ValueError(f"{where}[{index}]={strict.show(given[index])} must differ from {key}[{earlier}]")
        return tuple(values)

    def _points(self) -> Iterator[Point]:
        heads = heads_of(self._entry)
        # A key that no head reads stays, to be refused by name.
        read = {key: [head for head in heads if means_something(key, **head)] or heads for key in self._entry}
        # Seeds last: members that differ in nothing else stand together.
        tail = sorted((key for key in self.lists if key not in HEADS), key=lambda key: key == "seed")
        swept = [[key for key in tail if head in read[key]] for head in heads]
        self._check_size([[len(self.lists[key]) for key in keys] for keys in swept])
        for head, keys in zip(heads, swept, strict=True):
            own = {key: value for key, value in self._entry.items() if head in read[key]}
            for places in itertools.product(*(range(len(self.lists[key])) for key in keys)):
                chosen = {key: self.lists[key].index(head[key]) for key in HEADS if key in self.lists}
                chosen |= dict(zip(keys, places, strict=True))
                values = {key: self.lists[key][place] for key, place in chosen.items()}
                yield Point(values={**own, **values}, chosen=chosen)

    def _check_size(self, sizes: Sequence[Sequence[int]]) -> None:
        count = sum(math.prod(size) for size in sizes)
        if count > MAX_MEMBERS:
            lists = ", ".join(f"{len(values)} of {key}" for key, values in self.lists.items())
            raise ValueError(
                f"{self.path} stands for {count:,} adapters ({lists}): at most {MAX_MEMBERS:,} are allowed"
            )

    def names(self, name: str) -> list[str]:
        """A name for every point, made of the entry's name and of what varies: ``qa-lora-lr1e-4-r8-seed0``.

        Raises:
            ValueError: when the entry's name leaves no room for that.
        """
        varying = {key: _spellings(key, values) for key, values in self.lists.items() if len(values) > 1}
        names = [
            "-".join([name, *(varying[key][place] for key, place in point.chosen.items() if key in varying)])
            for point in self.points
        ]
        if max(map(len, names)) > LONGEST_NAME:
            digits = len(str(len(names) - 1))
            names = [f"{name}-{index:0{digits}}" for index in range(len(names))]
        if max(map(len, names)) > LONGEST_NAME:
            raise ValueError(f"{self.path}.name={name!r} leaves no room for its members' names, such as {names[-1]!r}")
        return names

    def locate(self, message: str, point: Point) -> str:
        """An error about a point, told of the list's element: ``adapters[0].lr[1]=0.0 must be above 0``."""
        subject = re.match(rf"{re.escape(self.path)}\.(\w+)", message)
        if subject is not None and subject[1] in point.chosen:
            message = f"{subject[0]}[{point.chosen[subject[1]]}]{message[subject.end() :]}"
        others = [f"{key}={point.values[key]!r}" for key in point.chosen if subject is None or key != subject[1]]
        return f"{message} (with {', '.join(others)})" if others else message


def _spellings(key: str, values: Sequence[Any]) -> list[str]:
    """What a name says of each value of a key."""
    spelled = [_spell(value) for value in values]
    if len({text.lower() for text in spelled}) < len(spelled) or max(map(len, spelled)) > LONGEST_VALUE:
        spelled = [str(index) for index in range(len(values))]
    return [text if key in SPEAKING else key + "_" * (not text[:1].isdigit()) + text for text in spelled]


def _spell(value: object) -> str:
    if isinstance(value, tuple):
        return "_".join(_spell(item) for item in value)
    if isinstance(value, dict):
        return "_".join(f"{_plain(key)}_{_spell(item)}" for key, item in value.items()) or "none"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = _spell_float(value) if isinstance(value, float) else str(value)
    if isinstance(value, str) and PurePath(value).suffix:  # a file
        text = PurePath(value).stem
    return _plain(text)


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", text)


def _spell_float(value: float) -> str:
    """The shorter of ``0.5`` and ``5e-1``."""
    number = Decimal(repr(value)).normalize()
    digits = "".join(map(str, number.as_tuple().digits))
    fixed, mantissa = f"{number:f}", ".".join(filter(None, (digits[0], digits[1:])))
    scientific = f"{mantissa}e{number.adjusted()}"
    # A name cannot hold a dot, so where both are as short, the one without.
    return scientific if len(scientific) < len(fixed) + ("." in fixed) else fixed
