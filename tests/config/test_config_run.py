"""A run's config: every key is honoured or refused with its path, its value and its rule."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe_peft.adapters import METHODS, LoraConfig, MixLoraConfig
from moe_peft.config import AdapterJob, TrainConfig
from moe_peft.config.job import adapter_keys
from moe_peft.strict import field_names

KNOWN = ", ".join(METHODS)

LORA = {"name": "style", "method": "lora", "data": "style.jsonl"}
MIXLORA = {"name": "qa", "method": "mixlora", "data": "qa.jsonl"}


def run(*entries: dict[str, Any], **keys: Any) -> TrainConfig:
    return TrainConfig.from_dict({"base_model": "base", "adapters": list(entries) or [LORA], **keys})


def refusal(*entries: dict[str, Any], **keys: Any) -> str:
    with pytest.raises(ValueError) as caught:
        run(*entries, **keys)
    return str(caught.value)


def test_an_adapter_takes_its_methods_keys_inline() -> None:
    config = run(
        {**LORA, "r": 4, "lr": "1e-3"}, {**MIXLORA, "num_experts": 4, "target_modules": ["gate_proj", "q_proj"]}
    )
    assert config.adapters == (
        AdapterJob(name="style", method="lora", adapter=LoraConfig(r=4), data="style.jsonl", lr=1e-3),
        AdapterJob(
            name="qa",
            method="mixlora",
            adapter=MixLoraConfig(num_experts=4, target_modules=("gate_proj", "q_proj")),
            data="qa.jsonl",
        ),
    )


def test_a_method_and_a_job_share_no_key() -> None:
    for config in METHODS.values():
        assert not set(field_names(config)) & {*field_names(AdapterJob), *field_names(TrainConfig), "defaults"}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lora_alhpa": 3}, "adapters[1].lora_alhpa=3 is not a known key; did you mean 'lora_alpha'?"),
        (
            {"num_experts": 8},
            "adapters[1].num_experts=8 is not a known key: it is a key of method mixlora, not of lora",
        ),
        (
            {"dtype": "auto"},
            "adapters[1].dtype='auto' is not a known key: it is a key of the run: put it at the top level",
        ),
        ({"adapter": {}}, "adapters[1].adapter={} is not a known key"),
        ({"method": "lorra"}, f"adapters[1].method='lorra' must be one of {KNOWN}; did you mean 'lora'?"),
        (
            {"method": ["lora", "lorra"]},
            f"adapters[1].method[1]='lorra' must be one of {KNOWN}; did you mean 'lora'?",
        ),
        ({"method": None}, f"adapters[1].method=None must be one of {KNOWN}"),
        (
            {"name": "a/b"},
            "adapters[1].name='a/b' must be 1 to 100 letters, digits, _ or -: it becomes a folder's name",
        ),
        ({"name": "x\n"}, "adapters[1].name='x\\n' must be 1 to 100 letters"),
        ({"name": "x" * 101}, f"adapters[1].name={'x' * 101!r} must be 1 to 100 letters"),
        ({"name": 7}, "adapters[1].name=7 must be str, not int (put it in quotes)"),
        ({"name": "qa"}, "adapters[1].name='qa' must be unique: adapters[0] is named 'qa'"),
        ({"name": "QA"}, "adapters[1].name='QA' must be unique: adapters[0] is named 'qa' (names become folders, so"),
        ({"r": 0}, "adapters[1].r=0 must be at least 1"),
        ({"r": "8"}, "adapters[1].r='8' must be int, not str"),
        ({"target_modules": ["q_prj"]}, "adapters[1].target_modules has 'q_prj'"),
        ({"data": ""}, "adapters[1].data='' must not be empty"),
        ({"data": None}, "adapters[1].data=None must be str, not null"),
        ({"eval_data": ""}, "adapters[1].eval_data='' must not be empty"),
        ({"template": ""}, "adapters[1].template='' must not be empty"),
        ({"cutoff_len": 7}, "adapters[1].cutoff_len=7 must be at least 8"),
        ({"overlong": "skp"}, "adapters[1].overlong='skp' must be one of error, skip; did you mean 'skip'?"),
        ({"batch_size": 0}, "adapters[1].batch_size=0 must be at least 1"),
        ({"micro_batch_size": 9}, "adapters[1].micro_batch_size=9 must be in 1..batch_size=8, or null"),
        ({"micro_batch_size": 0}, "adapters[1].micro_batch_size=0 must be in 1..batch_size=8, or null"),
        ({"num_epochs": 0}, "adapters[1].num_epochs=0 must be at least 1"),
        ({"num_epochs": 1.5}, "adapters[1].num_epochs=1.5 must be int, not float"),
        ({"max_steps": 0}, "adapters[1].max_steps=0 must be at least 1, or null"),
        ({"optimizer": "adam"}, "adapters[1].optimizer='adam' must be one of adamw, sgd; did you mean 'adamw'?"),
        ({"lr": 0}, "adapters[1].lr=0.0 must be above 0"),
        ({"lr": True}, "adapters[1].lr=True must be float, not bool"),
        ({"lr": float("nan")}, "adapters[1].lr=nan must be a finite number"),
        ({"lr": "fast"}, "adapters[1].lr='fast' must be float, not str"),
        ({"betas": [0.9, 1]}, "adapters[1].betas=(0.9, 1.0) must both be in 0..1, 1 excluded"),
        ({"betas": [0.9]}, "adapters[1].betas=[0.9] must hold 2 values, not 1"),
        ({"eps": 0.0}, "adapters[1].eps=0.0 must be above 0"),
        ({"momentum": 1.0, "optimizer": "sgd"}, "adapters[1].momentum=1.0 must be in 0..1, 1 excluded"),
        ({"momentum": 0.9}, "adapters[1].momentum=0.9 is a key of optimizer='sgd', not of 'adamw'"),
        ({"eps": 1e-6, "optimizer": "sgd"}, "adapters[1].eps=1e-06 is a key of optimizer='adamw', not of 'sgd'"),
        ({"weight_decay": -0.1}, "adapters[1].weight_decay=-0.1 must be at least 0"),
        (
            {"lr_scheduler": "cosin"},
            "adapters[1].lr_scheduler='cosin' must be one of constant, linear, cosine; did you",
        ),
        ({"decay_router": True}, "adapters[1].decay_router=true is for methods with a router"),
        ({"warmup_steps": -1}, "adapters[1].warmup_steps=-1 must be at least 0"),
        ({"warmup_ratio": 1.0}, "adapters[1].warmup_ratio=1.0 must be in 0..1, 1 excluded"),
        ({"warmup_steps": 5, "warmup_ratio": 0.1}, "adapters[1].warmup_steps=5 and warmup_ratio=0.1 say one thing"),
        ({"max_grad_norm": 0}, "adapters[1].max_grad_norm=0.0 must be above 0, or null"),
        ({"eval_steps": 0, "eval_data": "x"}, "adapters[1].eval_steps=0 must be at least 1, or null"),
        ({"eval_steps": 5}, "adapters[1].eval_steps=5 needs eval_data: there is nothing to evaluate on"),
        ({"patience": 3, "eval_data": "x"}, "adapters[1].patience=3 needs eval_steps: it counts evaluations"),
        ({"patience": 0, "eval_data": "x", "eval_steps": 1}, "adapters[1].patience=0 must be at least 1, or null"),
        ({"min_delta": 0.1}, "adapters[1].min_delta=0.1 needs patience: without it nothing is stopped early"),
        ({"min_delta": -0.1}, "adapters[1].min_delta=-0.1 must be at least 0"),
        ({"max_bad_steps": 0}, "adapters[1].max_bad_steps=0 must be at least 1"),
        ({"seed": -1}, "adapters[1].seed=-1 must be in 0..2**63-1"),
        ({"seed": 2**63}, f"adapters[1].seed={2**63} must be in 0..2**63-1"),
    ],
)
def test_what_an_adapter_must_not_be(keys: dict[str, Any], message: str) -> None:
    assert refusal(MIXLORA, {**LORA, **keys}).startswith(message)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"max_batch_token": 1}, "max_batch_token=1 is not a known key; did you mean 'max_batch_tokens'?"),
        ({"lr": 1}, "lr=1 is not a known key: it is a key of an adapter: put it in its entry, or under defaults"),
        ({"base_model": ""}, "base_model='' must not be empty"),
        ({"base_model": None}, "base_model=None must be str, not null"),
        (
            {"dtype": "flaot32"},
            "dtype='flaot32' must be one of auto, float32, bfloat16, float16, float64; did you mean",
        ),
        (
            {"activation_checkpointing": "selectiv"},
            "activation_checkpointing='selectiv' must be one of none, full, selective; did you mean 'selective'?",
        ),
        ({"activation_checkpointing": None}, "activation_checkpointing=None must be one of none, full, selective"),
        ({"activation_checkpointing": True}, "activation_checkpointing=True must be one of none, full, selective"),
        ({"device": "gpu"}, "device='gpu' must be auto, cpu, cuda, cuda:N or mps"),
        ({"device": "cuda:x"}, "device='cuda:x' must be auto, cpu, cuda, cuda:N or mps"),
        ({"output_dir": ""}, "output_dir='' must not be empty; null picks a free name"),
        ({"seed": None}, "seed=None must be int, not null"),
        ({"max_batch_tokens": 0}, "max_batch_tokens=0 must be at least 1"),
        ({"answer_examples": -1}, "answer_examples=-1 must be at least 0"),
        ({"num_threads": 0}, "num_threads=0 must be at least 1, or null"),
        ({"max_concurrent_adapters": 0}, "max_concurrent_adapters=0 must be at least 1, or null"),
        ({"save_steps": 0}, "save_steps=0 must be at least 1, or null"),
        ({"keep_checkpoints": 0}, "keep_checkpoints=0 must be at least 1"),
        ({"keep_checkpoints": None}, "keep_checkpoints=None must be int, not null"),
        ({"tensorboard": 1}, "tensorboard=1 must be bool, not int"),
        ({"adapters": []}, "adapters=[] must hold at least one adapter"),
        ({"adapters": {"qa": MIXLORA}}, "adapters={'qa': {"),
        ({"adapters": ["qa"]}, "adapters[0]='qa' must be a mapping of keys to values, not str"),
        ({"adapters": None}, "adapters=None must be list of mapping, not null"),
        ({"adapters": [{"method": "lora", "data": "x"}]}, "adapters[0].name is missing: it has no default"),
        ({"adapters": [{"name": "x", "method": "lora"}]}, "adapters[0].data is missing: it has no default"),
        ({"adapters": [{"name": "x", "data": "x"}]}, f"adapters[0].method is missing: it must be one of {KNOWN}"),
        (
            {"adapters": [{"name": "x", "methd": "lora"}]},
            "adapters[0].methd='lora' is not a known key; did you mean 'meth",
        ),
    ],
)
def test_what_a_run_must_not_be(keys: dict[str, Any], message: str) -> None:
    assert refusal(**keys).startswith(message)


def test_missing_keys_of_the_run_and_other_top_levels() -> None:
    with pytest.raises(ValueError, match=r"^adapters is missing: it has no default$"):
        TrainConfig.from_dict({"base_model": "x"})
    with pytest.raises(ValueError, match=r"^the top level must be a mapping of keys to values, not list$"):
        TrainConfig.from_dict([])  # type: ignore[arg-type]


def test_defaults_reach_every_adapter_that_can_take_them_and_the_entry_wins() -> None:
    config = run(
        {**LORA, "lr": 1e-3},
        MIXLORA,
        {**LORA, "name": "plain", "optimizer": "sgd"},
        defaults={"lr": 1e-5, "num_experts": 4, "momentum": 0.5, "betas": [0.8, 0.9], "r": 2},
    )
    style, qa, plain = config.adapters
    assert (style.lr, qa.lr, plain.lr) == (1e-3, 1e-5, 1e-5)
    assert (style.adapter, qa.adapter) == (LoraConfig(r=2), MixLoraConfig(r=2, num_experts=4))
    assert (style.momentum, plain.momentum) == (0.0, 0.5)
    assert (style.betas, plain.betas) == ((0.8, 0.9), (0.9, 0.999))
    assert run({"name": "x", "data": "y"}, defaults={"method": "mixlora"}).adapters[0].method == "mixlora"
    assert run(defaults=None) == run()


@pytest.mark.parametrize(
    ("defaults", "message"),
    [
        (3, "defaults=3 must be a mapping of keys to values, not int"),
        ({"lrr": 1}, "defaults.lrr=1 is not a known key; did you mean 'lr'?"),
        ({"name": "x"}, "defaults.name='x' is not a known key: each adapter needs its own: put it in its entry"),
        (
            {"dtype": "auto"},
            "defaults.dtype='auto' is not a known key: it is a key of the run: put it at the top level",
        ),
        (
            {"num_experts": 4},
            "defaults.num_experts=4 reaches no adapter: none has a method or an optimizer with this key",
        ),
        (
            {"momentum": 0.9},
            "defaults.momentum=0.9 reaches no adapter: none has a method or an optimizer with this key",
        ),
        ({"lr": -1}, "adapters[0].lr=-1.0 must be above 0 (the value comes from defaults)"),
        ({"r": "8"}, "adapters[0].r='8' must be int, not str (the value comes from defaults)"),
    ],
)
def test_what_defaults_must_not_be(defaults: object, message: str) -> None:
    assert refusal(defaults=defaults) == message


def test_reading_changes_nothing_it_was_given() -> None:
    data = {"base_model": "x", "defaults": {"lr": 1e-3}, "adapters": [dict(LORA)]}
    before = json.dumps(data)
    TrainConfig.from_dict(data)
    assert json.dumps(data) == before


def test_configs_built_in_python_are_checked_too() -> None:
    job = AdapterJob(name="a", method="lora", adapter=LoraConfig(), data=Path("x.jsonl"))  # type: ignore[arg-type]
    assert job.data == "x.jsonl"
    assert TrainConfig(base_model="b", adapters=[job]).adapters == (job,)  # type: ignore[arg-type]
    assert TrainConfig(base_model="b", adapters=[LORA]).adapters[0].name == "style"  # type: ignore[arg-type, list-item]
    with pytest.raises(
        ValueError, match=r"^adapter=MixLoraConfig\(.* of method='lora' must be LoraConfig, not MixLoraC"
    ):
        dataclasses.replace(job, adapter=MixLoraConfig())
    with pytest.raises(ValueError, match=f"^method='x' must be one of {KNOWN}$"):
        dataclasses.replace(job, method="x")
    with pytest.raises(ValueError, match=r"^lr='fast' must be float, not str$"):
        dataclasses.replace(job, lr="fast")  # type: ignore[arg-type]


def test_files_overrides_and_errors_with_the_files_name(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"base_model": "base", "adapters": [LORA, MIXLORA]}))
    overrides = ["seed=3", "adapters.*.lr=1e-3", "adapters.qa.num_experts=4", "defaults.batch_size=2", "device=cuda:1"]
    config = TrainConfig.from_file(path, [*overrides, "activation_checkpointing=none"])
    assert (config.seed, config.device, config.activation_checkpointing) == (3, "cuda:1", "none")
    assert [(job.lr, job.batch_size) for job in config.adapters] == [(1e-3, 2), (1e-3, 2)]
    assert config.adapters[1].adapter == MixLoraConfig(num_experts=4)
    with pytest.raises(ValueError) as caught:
        TrainConfig.from_file(path, ["adapters.style.num_experts=4"])
    assert str(caught.value).startswith(
        f"{path}: adapters[0].num_experts=4 is not a known key: it is a key of method mix"
    )
    with pytest.raises(ValueError, match=r"^override 'sed=1': 'sed' is not a key of the run; did you mean 'seed'\?$"):
        TrainConfig.from_file(path, ["sed=1"])


def test_the_embedded_default_is_valid_and_can_be_overridden() -> None:
    config = TrainConfig.default()
    assert config.base_model == "smollm2-135m"
    assert sorted(job.method for job in config.adapters) == ["lora", "mixlora", "mixlora"]
    assert all(job.data.startswith("bundled:") and job.eval_data for job in config.adapters)
    assert TrainConfig.default(["seed=7", "adapters.*.max_steps=2"]).adapters[2].max_steps == 2


POSITIVE = st.floats(1e-12, 10.0)
METHOD_KEYS = {
    "lora": {"r": st.integers(1, 64), "lora_dropout": st.floats(0, 0.9), "use_rslora": st.booleans()},
    "mixlora": {"num_experts": st.integers(2, 64), "target_modules": st.just(["up_proj"]), "lora_alpha": POSITIVE},
}
JOB_KEYS = {
    "eval_data": st.none() | st.just("bundled:qa:eval"),
    "template": st.sampled_from(["chat", "1e5", "null", "my: template.yaml"]),
    "micro_batch_size": st.none() | st.integers(1, 8),
    "lr": POSITIVE,
    "betas": st.lists(st.floats(0, 0.999), min_size=2, max_size=2),
    "max_grad_norm": st.none() | POSITIVE,
    "lr_scheduler": st.sampled_from(["constant", "linear", "cosine"]),
    "warmup_ratio": st.floats(0, 0.99),
    "seed": st.none() | st.integers(0, 2**63 - 1),
}


@st.composite
def entries(draw: st.DrawFn) -> dict[str, Any]:
    method = draw(st.sampled_from(sorted(METHOD_KEYS)))
    keys = draw(st.fixed_dictionaries({}, optional={**JOB_KEYS, **METHOD_KEYS[method]}))  # type: ignore[arg-type]
    name = draw(st.from_regex(r"[A-Za-z0-9_-]{1,9}", fullmatch=True))
    return {"name": name, "method": method, "data": draw(st.text(min_size=1)), **keys}


@settings(deadline=None)
@example([{**LORA, "data": "a\x85b\u2028c\u2029d\ufeffe\x00\r\n\té"}], {})
@given(
    st.lists(entries(), min_size=1, max_size=3, unique_by=lambda entry: entry["name"].lower()),
    st.fixed_dictionaries(
        {},
        optional={
            "output_dir": st.none() | st.text(min_size=1),
            "dtype": st.sampled_from(["auto", "bfloat16"]),
            "activation_checkpointing": st.sampled_from(["none", "full", "selective"]),
            "seed": st.integers(0, 2**63 - 1),
            "num_threads": st.none() | st.integers(1, 8),
        },
    ),
)
def test_a_config_reads_back_from_its_plain_data_and_its_yaml(jobs: list[dict[str, Any]], keys: dict[str, Any]) -> None:
    config = run(*jobs, **keys)
    plain = config.to_dict()
    assert TrainConfig.from_dict(plain) == config
    assert TrainConfig.from_dict(json.loads(json.dumps(plain))) == config
    assert TrainConfig.from_dict(yaml.safe_load(config.to_yaml())) == config
    assert list(plain) == list(field_names(TrainConfig))
    assert set(plain["adapters"][0]) == set(adapter_keys(plain["adapters"][0]["method"]))
