"""The grammar of key=value overrides: where they lead, and what leads nowhere."""

import copy
from collections.abc import Mapping
from typing import Any

import pytest

from moe_peft.config.overrides import KnownKeys, apply_overrides, parse_override

KEYS = {"lora": ["name", "method", "lr", "target_modules"], "mixlora": ["name", "method", "lr", "num_experts"]}


def keys_of(entry: Mapping[str, Any] | None) -> list[str]:
    return sorted({*KEYS["lora"], *KEYS["mixlora"]}) if entry is None else KEYS[entry["method"]]


KNOWN = KnownKeys(of_run=("base_model", "seed", "adapters", "defaults"), of_adapter=keys_of)
DATA = {
    "base_model": "x",
    "adapters": [
        {"name": "qa", "method": "lora"},
        {"name": "sum-1", "method": "mixlora"},
        {"name": "0", "method": "lora"},
    ],
}


def applied(*overrides: str) -> dict[str, Any]:
    data = copy.deepcopy(DATA)
    apply_overrides(data, overrides, KNOWN)
    return data


def refused(*overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        applied(*overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("seed=1", ["seed"], 1),
        ("a.b-c.d_e=true", ["a", "b-c", "d_e"], True),
        ("adapters[0].lr=null", ["adapters", "0", "lr"], None),
        ("adapters[*].lr=", ["adapters", "*", "lr"], None),
        ("x=[q_proj, v_proj]", ["x"], ["q_proj", "v_proj"]),
        ("x=bundled:qa:eval", ["x"], "bundled:qa:eval"),
        ("x=a=b", ["x"], "a=b"),
        ("x='7'", ["x"], "7"),
        ("x={a: 1}", ["x"], {"a": 1}),
    ],
)
def test_an_override_is_a_path_and_a_yaml_value(override: str, path: list[str], value: object) -> None:
    assert parse_override(override) == (path, value)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("foo", "must be written key=value"),
        ("--lr", "must be written key=value"),
        ("=1", "must be names joined by dots"),
        ("a..b=1", "must be names joined by dots"),
        ("a b=1", "must be names joined by dots"),
        ("a.=1", "must be names joined by dots"),
        ("adapters[x].lr=1", "must be names joined by dots"),
        ("a=[1", "the value is not valid YAML: "),
        ("a={b: 1, b: 2}", "the key 'b' stands twice in one mapping"),
        ("a=2024-13-01", "the value is not valid YAML: month must be in 1..12"),
    ],
)
def test_a_malformed_override_is_refused(override: str, reason: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_override(override)
    assert str(caught.value).startswith(f"override {override!r}")
    assert reason in str(caught.value)


def test_where_overrides_lead() -> None:
    assert applied("seed=1", "seed=2")["seed"] == 2
    assert applied("adapters.qa.lr=1")["adapters"][0]["lr"] == 1
    assert applied("adapters.1.lr=1")["adapters"][1]["lr"] == 1
    assert applied("adapters[2].lr=1")["adapters"][2]["lr"] == 1
    assert applied("adapters.0.lr=1")["adapters"] == applied("adapters[2].lr=1")["adapters"], (
        "a name wins over an index"
    )
    assert [entry["lr"] for entry in applied("adapters.*.lr=1", "adapters.qa.lr=2")["adapters"]] == [2, 1, 1]
    assert [e.get("num_experts") for e in applied("adapters.*.num_experts=4")["adapters"]] == [None, 4, None]
    assert applied("defaults.lr=1", "defaults.num_experts=2")["defaults"] == {"lr": 1, "num_experts": 2}
    assert applied("defaults={lr: 1}", "defaults.lr=2")["defaults"] == {"lr": 2}
    assert applied("adapters=[{name: new, method: lora}]", "adapters.new.lr=3")["adapters"][0]["lr"] == 3


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("sed=1", "'sed' is not a key of the run; did you mean 'seed'?"),
        ("lr=1", "lr is a key of an adapter: write adapters.*.lr= or adapters.NAME.lr="),
        ("seed.x=1", "'seed.x' must be written seed=value"),
        ("adapters.qa=1", "'adapters.qa' must be written adapters.NAME.KEY=value"),
        ("adapters.qa.target_modules.0=1", "'adapters.qa.target_modules.0' must be written adapters.NAME.KEY=value"),
        ("defaults.a.b=1", "'defaults.a.b' must be written defaults.KEY=value"),
        ("adapters.qa.lrr=1", "'lrr' is not a key of an adapter; did you mean 'lr'?"),
        ("defaults.num_expert=1", "'num_expert' is not a key of an adapter; did you mean 'num_experts'?"),
        ("adapters.aq.lr=1", "there is no adapter named 'aq'; valid here: 0, qa, sum-1"),
        ("adapters.sum.lr=1", "there is no adapter named 'sum'; did you mean 'sum-1'?"),
        ("adapters.3.lr=1", "adapters has 3 entries, counted from 0: there is no adapters.3"),
    ],
)
def test_a_path_that_leads_nowhere_is_refused(override: str, reason: str) -> None:
    assert refused(override) == f"override {override!r}: {reason}"


def test_an_override_of_every_adapter_must_reach_one() -> None:
    alone = "adapters=[{name: a, method: lora}]"
    assert refused(alone, "adapters.*.num_experts=1").endswith(
        "no adapter here has a method with the key 'num_experts'"
    )


def test_adapters_and_defaults_must_have_their_shape() -> None:
    assert "adapters must be a list of mappings" in refused("adapters=3", "adapters.qa.lr=1")
    assert "adapters must be a list of mappings" in refused("adapters=[3]", "adapters.*.lr=1")
    assert "defaults=3 must be a mapping of keys to values, not int" in refused("defaults=3", "defaults.lr=1")
