"""Mappings become dataclasses exactly, or are refused with the full path of what was wrong."""

import copy
import json
import math
import pickle
import re
from dataclasses import FrozenInstanceError, asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_peft import strict


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: int
    rate: float = 0.5

    def __post_init__(self) -> None:
        strict.check_fields(self)
        if self.size < 1:
            raise ValueError(f"size={self.size} must be at least 1")
        if self.rate == self.size:
            raise ValueError("rate and size must differ")
        if self.rate > 9:
            raise ValueError("too much of it")


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    switch: bool = False
    count: int | None = None
    mode: Literal["fast", "careful"] = "fast"
    init: bool | Literal["gaussian", "zeros"] = True
    names: str | tuple[str, ...] = "all"
    pair: tuple[float, float] = (0.0, 1.0)
    inner: Inner | None = None
    inners: tuple[Inner, ...] = ()
    anything: Any = None
    counts: dict[str, int] = field(default_factory=dict)
    rates: dict[str, float] | None = None


def refusal(cls: type, mapping: object, path: str = "") -> str:
    with pytest.raises(ValueError) as caught:
        strict.build(cls, mapping, path)
    return str(caught.value)


def test_every_kind_of_field_is_read() -> None:
    built = strict.build(
        Outer,
        {
            "name": "x",
            "switch": True,
            "count": 3,
            "mode": "careful",
            "init": "zeros",
            "names": ["a", "b"],
            "pair": [1, "2e-4"],
            "inner": {"size": 2, "rate": 1},
            "inners": [{"size": 1}, {"size": 3}],
            "anything": {"kept": ["as", 1]},
            "counts": {"a.b": 1, "c": 2},
            "rates": {"a": 1, "b": "2e-4"},
        },
    )
    assert built == Outer(
        name="x",
        switch=True,
        count=3,
        mode="careful",
        init="zeros",
        names=("a", "b"),
        pair=(1.0, 2e-4),
        inner=Inner(size=2, rate=1.0),
        inners=(Inner(size=1), Inner(size=3)),
        anything={"kept": ["as", 1]},
        counts={"a.b": 1, "c": 2},
        rates={"a": 1.0, "b": 2e-4},
    )
    assert built.inner is not None
    assert type(built.inner.rate) is float


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"name": "x", "swich": 1}, "at.swich=1 is not a known key; did you mean 'switch'?"),
        ({"name": "x", "NAMES": 1}, "at.NAMES=1 is not a known key; did you mean 'names'?"),
        ({"name": "x", 1: 2}, "at has the key 1 (int): keys are strings"),
        ({"name": "x", True: 2}, "at has the key True (bool): keys are strings"),
        ({}, "at.name is missing: it has no default"),
        ({"name": None}, "at.name=None must be str, not null"),
        ({"name": 7}, "at.name=7 must be str, not int (put it in quotes)"),
        ({"name": True}, "at.name=True must be str, not bool (put it in quotes)"),
        ({"name": ["x"]}, "at.name=['x'] must be str, not list"),
        ({"name": "x", "switch": 1}, "at.switch=1 must be bool, not int"),
        ({"name": "x", "switch": "true"}, "at.switch='true' must be bool, not str"),
        ({"name": "x", "count": True}, "at.count=True must be int | null, not bool"),
        ({"name": "x", "count": 3.0}, "at.count=3.0 must be int | null, not float"),
        ({"name": "x", "count": "3"}, "at.count='3' must be int | null, not str"),
        ({"name": "x", "count": [3]}, "at.count=[3] must be int | null, not list"),
        ({"name": "x", "mode": "carefull"}, "at.mode='carefull' must be one of fast, careful; did you mean 'careful'?"),
        ({"name": "x", "mode": None}, "at.mode=None must be one of fast, careful"),
        (
            {"name": "x", "init": "guassian"},
            "at.init='guassian' must be bool | gaussian | zeros, not str; did you mean 'gaussian'?",
        ),
        ({"name": "x", "init": 1}, "at.init=1 must be bool | gaussian | zeros, not int"),
        ({"name": "x", "names": ["a", 3]}, "at.names[1]=3 must be str, not int (put it in quotes)"),
        ({"name": "x", "names": 3}, "at.names=3 must be str | list of str, not int (put it in quotes)"),
        ({"name": "x", "pair": [1]}, "at.pair=[1] must hold 2 values, not 1"),
        ({"name": "x", "pair": [1, "a"]}, "at.pair[1]='a' must be float, not str"),
        ({"name": "x", "pair": 1}, "at.pair=1 must be [float, float], not int"),
        ({"name": "x", "pair": [1, True]}, "at.pair[1]=True must be float, not bool"),
        ({"name": "x", "pair": [1, "0.5"]}, "at.pair[1]='0.5' must be float, not str"),
        ({"name": "x", "pair": [1, math.nan]}, "at.pair[1]=nan must be a finite number"),
        ({"name": "x", "pair": [1, -math.inf]}, "at.pair[1]=-inf must be a finite number"),
        ({"name": "x", "pair": [1, "1e999"]}, "at.pair[1]='1e999' must be a finite number"),
        ({"name": "x", "inner": 3}, "at.inner=3 must be a mapping of keys to values, not int"),
        ({"name": "x", "inner": {"size": 0}}, "at.inner.size=0 must be at least 1"),
        ({"name": "x", "inner": {"size": 1, "rate": 1}}, "at.inner.rate and size must differ"),
        ({"name": "x", "inner": {"size": 1, "rate": 10}}, "at.inner: too much of it"),
        ({"name": "x", "inners": [{"size": 1}, {"sise": 2}]}, "at.inners[1].sise=2 is not a known key"),
        ({"name": "x", "inners": {"size": 1}}, "at.inners={'size': 1} must be list of mapping, not mapping"),
        ({"name": "x", "counts": {"a": "1"}}, "at.counts['a']='1' must be int, not str"),
        ({"name": "x", "counts": {"a": True}}, "at.counts['a']=True must be int, not bool"),
        ({"name": "x", "counts": {3: 1}}, "at.counts has the key 3 (int): keys are strings"),
        ({"name": "x", "counts": ["a"]}, "at.counts=['a'] must be mapping of str to int, not list"),
        ({"name": "x", "counts": "a"}, "at.counts='a' must be mapping of str to int, not str"),
        ({"name": "x", "counts": None}, "at.counts=None must be mapping of str to int, not null"),
        ({"name": "x", "rates": {"a": "1"}}, "at.rates['a']='1' must be float, not str"),
        ({"name": "x", "rates": 1}, "at.rates=1 must be mapping of str to float | null, not int"),
        ([], "at=[] must be a mapping of keys to values, not list"),
    ],
)
def test_refusals_name_the_path_the_value_and_the_rule(mapping: object, message: str) -> None:
    got = refusal(Outer, mapping, "at")
    assert got == message or (message.endswith("is not a known key") and got == f"{message}; did you mean 'size'?")


def test_an_unknown_key_with_nothing_near_lists_the_valid_ones() -> None:
    assert refusal(Inner, {"zzz": 1}) == "zzz=1 is not a known key; valid here: rate, size"


def test_a_key_of_another_place_is_sent_there() -> None:
    with pytest.raises(ValueError, match=r"^a\.speed=1 is not a known key: it lives elsewhere$"):
        strict.build(Inner, {"speed": 1}, "a", {"speed": "it lives elsewhere"})


def test_a_huge_integer_is_no_float_and_a_long_value_is_cut() -> None:
    message = refusal(Inner, {"size": 1, "rate": 10**400})
    assert re.fullmatch(r"rate=10{76}\.\.\. must be a finite number", message)


def test_python_values_are_checked_as_files_are() -> None:
    assert Inner(size=np.int64(3), rate=np.float32(0.5)) == Inner(size=3, rate=0.5)
    assert type(Inner(size=np.int64(3)).size) is int
    assert strict.coerce(Path("a/b"), str, "p") == str(Path("a/b"))
    with pytest.raises(ValueError, match=r"^size='3' must be int, not str$"):
        Inner(size="3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^rate=nan must be a finite number$"):
        Inner(size=1, rate=math.nan)


def test_instances_pass_where_a_mapping_would() -> None:
    inner = Inner(size=4)
    assert strict.build(Outer, {"name": "x", "inner": inner}).inner is inner


@settings(deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_exponent_spelling_of_a_float_is_read(value: float) -> None:
    assert strict.coerce(f"{value:.17e}", float, "p") == value
    assert strict.coerce(f"{value:.17e}".replace("e+", "E"), float, "p") == value


INNERS = st.builds(Inner, size=st.integers(1, 9), rate=st.floats(0.01, 0.99))


@settings(deadline=None)
@given(
    st.builds(
        Outer,
        name=st.text(),
        switch=st.booleans(),
        count=st.none() | st.integers(),
        mode=st.sampled_from(["fast", "careful"]),
        init=st.booleans() | st.sampled_from(["gaussian", "zeros"]),
        names=st.text() | st.lists(st.text()).map(tuple),
        inner=st.none() | INNERS,
        inners=st.lists(INNERS, max_size=3).map(tuple),
        counts=st.dictionaries(st.text(), st.integers()),
        rates=st.none() | st.dictionaries(st.text(), st.floats(allow_nan=False, allow_infinity=False)),
    )
)
def test_plain_reads_back_to_an_equal_instance(outer: Outer) -> None:
    assert strict.build(Outer, strict.plain(outer)) == outer


def test_a_dictionary_in_a_config_cannot_change_and_is_a_part_of_its_identity() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Ranks:
        of: dict[str, int] = field(default_factory=dict)

        def __post_init__(self) -> None:
            strict.check_fields(self)

    given_ranks = {"a": 1, "b": 2}
    ranks = Ranks(of=given_ranks)
    given_ranks["a"] = 7
    assert ranks.of == {"a": 1, "b": 2}
    assert {ranks: "here"}[Ranks(of={"a": 1, "b": 2})] == "here"
    assert len({ranks, Ranks(), Ranks(of={"a": 1})}) == 3
    for change in (
        lambda of: of.__setitem__("a", 3),
        lambda of: of.__delitem__("a"),
        lambda of: of.update(a=3),
        lambda of: of.setdefault("z", 3),
        lambda of: of.pop("a"),
        lambda of: of.popitem(),
        lambda of: of.clear(),
        lambda of: of.__ior__({"a": 3}),
    ):
        with pytest.raises(TypeError):
            change(ranks.of)
    with pytest.raises(FrozenInstanceError):
        ranks.of = {}  # type: ignore[misc]
    for copied in (copy.copy(ranks), copy.deepcopy(ranks), pickle.loads(pickle.dumps(ranks.of)), replace(ranks)):
        assert copied in (ranks, ranks.of)
    assert json.dumps(asdict(ranks)) == '{"of": {"a": 1, "b": 2}}'
    assert type(strict.plain(ranks)["of"]) is dict
    assert repr(ranks.of) == "{'a': 1, 'b': 2}"
