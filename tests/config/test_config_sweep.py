"""An entry with lists stands for a grid: its members, their names, and what is refused."""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_peft.adapters import METHODS, LoraConfig, MixLoraConfig
from moe_peft.config import Sweep, TrainConfig
from moe_peft.config.grid import MAX_MEMBERS, Grid
from moe_peft.config.job import ADAPTER_NAME

KNOWN = ", ".join(METHODS)

QA = {"name": "qa", "method": "lora", "data": "qa.jsonl"}
HALVED = {"halve_every": 10, "metric": "loss"}


def run(*entries: Mapping[str, Any], **keys: Any) -> TrainConfig:
    return TrainConfig.from_dict({"base_model": "base", "adapters": [dict(entry) for entry in entries], **keys})


def names(*entries: Mapping[str, Any], **keys: Any) -> list[str]:
    return [job.name for job in run(*entries, **keys).adapters]


def refusal(*entries: Mapping[str, Any], **keys: Any) -> str:
    with pytest.raises(ValueError) as caught:
        run(*entries, **keys)
    return str(caught.value)


def test_lists_stand_for_their_grid_and_the_names_say_what_varies() -> None:
    config = run({**QA, "lr": ["1e-4", 2e-4], "r": [8, 16], "seed": [0, 1, 2], "batch_size": [4]}, {**QA, "name": "b"})
    *members, other = config.adapters
    grid = list(itertools.product((1e-4, 2e-4), (8, 16), (0, 1, 2)))
    assert [(job.lr, job.adapter, job.seed) for job in members] == [(lr, LoraConfig(r=r), seed) for lr, r, seed in grid]
    assert [job.name for job in members] == [f"qa-lr{lr * 1e4:.0f}e-4-r{r}-seed{seed}" for lr, r, seed in grid]
    assert {(job.sweep, job.batch_size) for job in members} == {("qa", 4)}
    assert config.sweeps == (Sweep(name="qa"),)
    assert (other.name, other.sweep) == ("b", None)


def test_a_key_of_one_method_varies_there_only_and_no_member_stands_twice() -> None:
    entry = {**QA, "num_experts": [4, 8], "seed": [0, 1], "top_k": 1, "r": [2, 4], "method": ["lora", "mixlora"]}
    members = run(entry).adapters
    assert [job.adapter for job in members[::2]] == [
        *(LoraConfig(r=r) for r in (2, 4)),
        *(MixLoraConfig(r=r, num_experts=experts, top_k=1) for experts in (4, 8) for r in (2, 4)),
    ]
    assert [job.name for job in members[::2]] == [
        "qa-lora-r2-seed0",
        "qa-lora-r4-seed0",
        *(f"qa-mixlora-num_experts{experts}-r{r}-seed0" for experts in (4, 8) for r in (2, 4)),
    ]
    assert [job.seed for job in members] == [0, 1] * 6


def test_the_same_holds_for_keys_of_one_optimizer_and_of_routers() -> None:
    jobs = run({**QA, "optimizer": ["adamw", "sgd"], "momentum": [0.0, 0.9], "betas": [0.8, 0.9]}).adapters
    assert [(job.optimizer, job.momentum, job.betas) for job in jobs] == [
        ("adamw", 0.0, (0.8, 0.9)),
        ("sgd", 0.0, (0.9, 0.999)),
        ("sgd", 0.9, (0.9, 0.999)),
    ]
    jobs = run({**QA, "method": ["lora", "mixlora"], "decay_router": [True, False]}).adapters
    assert [job.decay_router for job in jobs] == [False, True, False]


def test_a_key_whose_value_is_a_list_is_swept_by_a_list_with_lists() -> None:
    lists = {"target_modules": ["all-linear", ["q_proj", "v_proj"]], "betas": [[0.9, 0.99], [0.8, 0.999]]}
    jobs = run({**QA, **lists}).adapters
    assert [job.adapter.target_modules for job in jobs[::2]] == ["all-linear", ("q_proj", "v_proj")]
    assert [job.betas for job in jobs[:2]] == [(0.9, 0.99), (0.8, 0.999)]
    assert jobs[3].name == "qa-target_modules_q_proj_v_proj-betas0_8_0_999"
    plain = run({**QA, "target_modules": ["q_proj"], "betas": [0.8, 0.9]})
    assert (plain.sweeps, plain.adapters[0].adapter.target_modules) == ((), ("q_proj",))


@pytest.mark.parametrize(
    ("key", "values", "expected"),
    [
        ("lr", [1e-4, 0.00025, 0.01, 0.5, 1.0, 10, 3e-5], ["1e-4", "2_5e-4", "1e-2", "0_5", "1", "10", "3e-5"]),
        ("max_steps", [None, 5], ["_null", "5"]),
        ("use_rslora", [True, False], ["_true", "_false"]),
        ("init_lora_weights", [True, "gaussian"], ["_true", "_gaussian"]),
        ("overlong", ["error", "skip"], ["_error", "_skip"]),
        ("template", ["chat", "my/short form.yaml"], ["_chat", "_short_form"]),
        ("data", ["a/x.jsonl", "bundled:orders"], ["_x", "_bundled_orders"]),
        ("data", ["a/x.jsonl", "b/X.jsonl"], ["0", "1"]),  # one folder on some file systems
        ("rank_pattern", [{}, {"q_proj": 4}, {"v_proj": 2, "up": 3}], ["_none", "_q_proj_4", "_v_proj_2_up_3"]),
        ("rank_pattern", [{"a.b": 4}, {"a-b": 4}, {"a.*b": 4}], ["_a_b_4", "_a-b_4", "_a__b_4"]),
        ("layers_to_transform", [[0, 1], [2]], ["0_1", "2"]),
        ("target_modules", [["q_proj"], ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]], ["0", "1"]),
    ],
)
def test_how_a_name_spells_a_value(key: str, values: list[Any], expected: list[str]) -> None:
    assert names({**QA, key: values}) == [f"qa-{key}{text}" for text in expected]


def test_values_that_speak_for_themselves_stand_without_their_key() -> None:
    entry = {**QA, "lr_scheduler": ["linear", "cosine"], "optimizer": ["sgd", "adamw"]}
    assert names(entry) == ["qa-sgd-linear", "qa-sgd-cosine", "qa-adamw-linear", "qa-adamw-cosine"]


def test_names_that_would_be_too_long_are_numbered() -> None:
    long = "x" * 97
    assert names({**QA, "name": long, "seed": list(range(11))})[9:] == [f"{long}-09", f"{long}-10"]
    message = refusal({**QA, "name": long + "y", "seed": list(range(11))})
    assert message == f"adapters[0].name={long + 'y'!r} leaves no room for its members' names, such as '{long}y-10'"


def test_a_list_of_one_is_a_sweep_of_one_and_its_value_needs_no_name() -> None:
    config = run({**QA, "lr": [1e-3], "sweep": HALVED})
    assert ([job.name for job in config.adapters], [job.lr for job in config.adapters]) == (["qa"], [1e-3])
    assert config.sweeps == (Sweep(name="qa", halve_every=10, metric="loss"),)


def test_defaults_hold_lists_too() -> None:
    defaults = {"seed": [0, 1], "num_experts": [2, 4], "sweep": HALVED, "momentum": [0.5], "lr": [1e-3, 1e-4]}
    plain = {**QA, "name": "plain", "optimizer": "sgd", "lr": 1e-3, "seed": None, "momentum": 0.1}
    config = run(
        {**QA, "method": "mixlora", "lr": 1e-5}, plain, {**QA, "name": "s", "optimizer": "sgd"}, defaults=defaults
    )
    assert [job.name for job in config.adapters] == [
        *(f"qa-num_experts{experts}-seed{seed}" for experts in (2, 4) for seed in (0, 1)),
        "plain",
        *(f"s-lr{lr}-seed{seed}" for lr in ("1e-3", "1e-4") for seed in (0, 1)),
    ]
    assert [sweep.name for sweep in config.sweeps] == ["qa", "s"]
    assert [job.momentum for job in config.adapters] == [0.0] * 4 + [0.1] + [0.5] * 4


def test_overrides_come_before_the_grid(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"base_model": "base", "adapters": [{**QA, "lr": [1e-3, 1e-4]}]}))
    overrides = ["adapters.qa.lr=[1e-5,2e-5]", "adapters.*.method=[lora,mixlora]", "adapters.*.top_k=[1, 2]"]
    config = TrainConfig.from_file(path, [*overrides, "adapters.qa.sweep={halve_every: 2, metric: loss}"])
    assert [job.name for job in config.adapters] == [
        *(f"qa-lora-lr{lr}" for lr in ("1e-5", "2e-5")),
        *(f"qa-mixlora-lr{lr}-top_k{k}" for lr in ("1e-5", "2e-5") for k in (1, 2)),
    ]
    assert config.sweeps[0].halve_every == 2
    resolved = tmp_path / "config.yaml"
    resolved.write_text(config.to_yaml())
    again = TrainConfig.from_file(resolved, ["adapters.qa-lora-lr1e-5.lr=1e-6"])
    assert [job.lr for job in again.adapters[:2]] == [1e-6, 2e-5]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lr": [1e-4, 0]}, "adapters[1].lr[1]=0.0 must be above 0"),
        ({"lr": [1e-4, "fast"]}, "adapters[1].lr[1]='fast' must be float, not str"),
        ({"lr": [1e-4, [2e-4]]}, "adapters[1].lr[1]=[0.0002] must be float, not list"),
        ({"lr": []}, "adapters[1].lr=[] must hold at least one value to sweep over"),
        ({"lr": [1e-4, 2e-4, "1e-4"]}, "adapters[1].lr[2]='1e-4' must differ from lr[0]"),
        ({"lr": [1, 2], "r": [2, 0]}, "adapters[1].r[1]=0 must be at least 1 (with lr=1.0)"),
        ({"lr": [1, 2], "r": 0}, "adapters[1].r=0 must be at least 1 (with lr=1.0)"),
        ({"seed": [0, True]}, "adapters[1].seed[1]=True must be int | null, not bool"),
        ({"betas": [[0.9, 0.99], [0.9]]}, "adapters[1].betas[1]=[0.9] must hold 2 values, not 1"),
        ({"target_modules": [["q_proj"], ["q_prj"]]}, "adapters[1].target_modules[1] has 'q_prj', but must be"),
        ({"target_modules": [["q_proj"], 3]}, "adapters[1].target_modules[1]=3 must be str | list of str, not int"),
        (
            {"method": ["lora", "mixlor"]},
            f"adapters[1].method[1]='mixlor' must be one of {KNOWN}; did you mean",
        ),
        ({"method": [["lora"]]}, "adapters[1].method[0]=['lora'] must be str, not list"),
        ({"num_experts": [4, 8]}, "adapters[1].num_experts[0]=4 is not a known key: it is a key of method mixlora"),
        ({"momentum": [0, 0.9]}, "adapters[1].momentum[1]=0.9 is a key of optimizer='sgd', not of 'adamw'"),
        (
            {"method": ["mixlora", "lora"], "num_experts": [2, 8], "top_k": [2, 4]},
            "adapters[1].top_k[1]=4 must be in 1..num_experts=2 (with method='mixlora', num_experts=2)",
        ),
        ({"lrr": [1, 2]}, "adapters[1].lrr=[1, 2] is not a known key; did you mean 'lr'?"),
        ({"name": ["a", "b"]}, "adapters[1].name=['a', 'b'] must be one value, not a list: each member gets its own"),
        ({"name": "a b", "lr": [1, 2]}, "adapters[1].name='a b' must be 1 to 100 letters, digits, _ or -"),
        ({"name": None, "lr": [1, 2]}, "adapters[1].name=None must be str, not null"),
        ({"eval_data": ["a", "b"]}, "adapters[1].eval_data=['a', 'b'] must be one value, not a list: members are"),
        ({"seed": list(range(MAX_MEMBERS + 1))}, "adapters[1] stands for 1,001 adapters (1001 of seed): at most 1,000"),
        (
            {"seed": list(range(100)), "r": list(range(1, 65)), "lr": [1, 2]},
            "adapters[1] stands for 12,800 adapters (100 of seed, 64 of r, 2 of lr): at most 1,000 are allowed",
        ),
        ({"sweep": HALVED}, "adapters[1].sweep={'halve_every': 10, 'metric': 'loss'} needs a key with a list"),
        ({"sweep": "qa"}, "adapters[1].sweep='qa' must be the name of one of the run's sweeps"),
        ({"sweep": [HALVED]}, "adapters[1].sweep=[{'halve_every': 10, 'metric': 'loss'}] must be str | null, not list"),
        ({"sweep": "qa", "lr": [1, 2]}, "adapters[1].sweep='qa' puts it into a sweep, so lr must be one value, not a"),
        (
            {"sweep": [HALVED], "lr": [1, 2]},
            "adapters[1].sweep=[{'halve_every': 10, 'metric': 'loss'}] must be a mapping",
        ),
        ({"sweep": {"halve_evry": 1}, "lr": [1, 2]}, "adapters[1].sweep.halve_evry=1 is not a known key; did you mean"),
        ({"sweep": {"name": "x"}, "lr": [1, 2]}, "adapters[1].sweep.name='x' is not a known key"),
        ({"sweep": {"halve_every": 0}, "lr": [1, 2]}, "adapters[1].sweep.halve_every=0 must be at least 1, or null"),
        ({"sweep": {"halve_every": 5, "keep": 1}, "lr": [1]}, "adapters[1].sweep.keep=1.0 must be above 0 and below 1"),
        ({"sweep": {"halve_every": 5, "keep": 0}, "lr": [1]}, "adapters[1].sweep.keep=0.0 must be above 0 and below 1"),
        ({"sweep": {"keep": 0.3}, "lr": [1, 2]}, "adapters[1].sweep.keep=0.3 needs halve_every: without it nothing is"),
        ({"sweep": {"metric": "loss"}, "lr": [1]}, "adapters[1].sweep.metric='loss' needs halve_every: without it"),
        (
            {"sweep": {"halve_every": 5, "metric": "los"}, "lr": [1]},
            "adapters[1].sweep.metric='los' must be one of eval_loss, loss; did you mean 'loss'?",
        ),
        ({"sweep": {"halve_every": 5}, "lr": [1]}, "adapters[1].sweep compares eval_loss, so it needs eval_data"),
        (
            {"sweep": HALVED, "max_steps": [5, 10]},
            "adapters[1].sweep has halve_every=10, which must be below max_steps=10: no member would reach a selection",
        ),
    ],
)
def test_what_a_sweep_must_not_be(keys: dict[str, Any], message: str) -> None:
    assert refusal({**QA, "name": "other"}, {**QA, **keys}).startswith(message)


def test_halving_reaches_its_members_when_one_of_them_can_be_compared() -> None:
    assert run({**QA, "sweep": HALVED, "max_steps": [5, 11]}).sweeps[0].halve_every == 10
    assert run({**QA, "sweep": HALVED, "max_steps": [5, None]}).sweeps[0].halve_every == 10


def test_a_mistake_in_the_defaults_lists_is_told_as_theirs() -> None:
    message = refusal(QA, defaults={"lr": [1, -1]})
    assert message == "adapters[0].lr[1]=-1.0 must be above 0 (the value comes from defaults)"
    message = refusal(QA, defaults={"sweep": HALVED})
    assert message.endswith("reaches no adapter: none has a key with a list")
    message = refusal(QA, defaults={"num_experts": [2, 4]})
    assert message.endswith("reaches no adapter: none has a method or an optimizer with this key")


def test_members_share_no_name_with_another_adapter() -> None:
    message = refusal({**QA, "seed": [0, 1]}, {**QA, "name": "b"}, {**QA, "name": "QA-seed1"})
    assert message == (
        "adapters[2].name='QA-seed1' must be unique: adapters[0] has a member named 'qa-seed1' (names become folders, "
        "so case does not tell them apart)"
    )
    assert (
        refusal({**QA, "seed": [0, 1]}, {**QA, "lr": [1]})
        == "sweeps[1].name='qa' must be unique: sweeps[0] has this name"
    )


@pytest.mark.parametrize(
    ("sweeps", "message"),
    [
        ([], "adapters[0].sweep='grid' must be the name of one of the run's sweeps"),
        (
            [{"name": "gird"}],
            "adapters[0].sweep='grid' must be the name of one of the run's sweeps; did you mean 'gird'?",
        ),
        ([{"name": "grid"}, {"name": "x"}], "sweeps[1].name='x' must be what some adapter's sweep says: none does"),
        ([{"name": "grid"}, {"name": "grid"}], "sweeps[1].name='grid' must be unique: sweeps[0] has this name"),
        ([{"name": "grid", "halve_every": 3}], "adapters[0].sweep compares eval_loss, so it needs eval_data"),
        ([{"name": "grid", "halve": 3}], "sweeps[0].halve=3 is not a known key; did you mean 'halve_every'?"),
        ([{"halve_every": 3}], "sweeps[0].name is missing: it has no default"),
        ([{"name": "a/b"}], "sweeps[0].name='a/b' must be 1 to 100 letters, digits, _ or -"),
        ({"name": "grid"}, "sweeps={'name': 'grid'} must be list of mapping, not mapping"),
    ],
)
def test_sweeps_of_the_run_and_their_members_belong_together(sweeps: Any, message: str) -> None:
    assert refusal({**QA, "sweep": "grid"}, sweeps=sweeps).startswith(message)


def test_a_sweep_can_be_put_together_by_hand_beside_another() -> None:
    hand = [{**QA, "name": name, "sweep": "hand"} for name in ("a", "b")]
    config = run(*hand, {**QA, "seed": [0, 1]}, sweeps=[{"name": "hand", **HALVED}])
    assert config.sweeps == (Sweep(name="hand", halve_every=10, metric="loss"), Sweep(name="qa"))


LISTS = {
    "lr": [[1e-4, 2e-4], [0.1, 0.25, 1.0]],
    "r": [[1, 2]],
    "seed": [[0, 1, None]],
    "method": [["lora", "mixlora"], ["mixlora"]],
    "num_experts": [[2, 4]],
    "optimizer": [["sgd", "adamw"]],
    "momentum": [[0.5, 0.9]],
    "target_modules": [["all-linear", ["up_proj"]], [["q_proj", "up_proj"], ["down_proj"]]],
    "template": [["chat", "a b.yaml", "c/a.b.yaml"]],
}


@settings(deadline=None, max_examples=25)
@given(st.data(), st.sets(st.sampled_from(sorted(LISTS)), max_size=3))
def test_every_grid_has_unique_members_and_survives_its_resolved_form(data: st.DataObject, keys: set[str]) -> None:
    lists: dict[str, Any] = {key: data.draw(st.sampled_from(LISTS[key])) for key in sorted(keys)}
    both = {"method": ["lora", "mixlora"], "optimizer": ["sgd", "adamw"]}
    entry = {**QA, **({"method": both["method"]} if "num_experts" in lists else {}), **lists}
    entry |= {"optimizer": both["optimizer"]} if "momentum" in lists else {}
    config = run(entry)
    assert all(ADAPTER_NAME.fullmatch(job.name) for job in config.adapters)
    same = [{k: v for k, v in job.to_dict().items() if k not in ("name", "sweep")} for job in config.adapters]
    assert len({json.dumps(each, sort_keys=True) for each in same}) == len(config.adapters)
    swept = {key: value for key, value in entry.items() if key in LISTS and isinstance(value, list)}
    for key, values in swept.items():
        found = {json.dumps(each[key]) for each in same if key in each}
        reached = {json.dumps(0.0)} if key == "momentum" and "optimizer" in swept else set()  # of adamw
        assert found == {json.dumps(value) for value in values} | reached
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert TrainConfig.from_dict(yaml.safe_load(config.to_yaml())) == config


def test_a_huge_grid_is_refused_before_it_is_built() -> None:
    lists = {key: list(range(10_000)) for key in ("seed", "max_steps", "batch_size", "num_epochs")}
    with pytest.raises(ValueError, match=r"^adapters\[0\] stands for 10,000,000,000,000,000 adapters"):
        Grid({**QA, **lists}, "adapters[0]")
