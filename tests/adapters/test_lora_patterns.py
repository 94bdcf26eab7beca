"""Ranks and alphas by pattern, and chosen layers: as the real peft has them, and refused where they choose nothing."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from builders import add_random_adapter, assert_close, fuse, random_run, randomize, run_step, tiny_config, tiny_model
from every_method import CONFIGS
from peft_pair import assert_same_step, base_pair, copy_weights, our_logits, their_logits, their_weights, with_peft

from moe_peft import DoraConfig, LoraConfig, MixLoraConfig, TrainConfig, load_adapter, save_adapter
from moe_peft.adapters.layer_patterns import value_at
from moe_peft.adapters.lora import PROJECTIONS, module_path
from moe_peft.config.help import config_reference
from moe_peft.io.adapter_files import read_adapter_config

SETTINGS: dict[str, dict[str, Any]] = {
    "names": {"r": 3, "rank_pattern": {"q_proj": 5, "mlp.down_proj": 1}, "alpha_pattern": {"v_proj": 2.5}},
    "regex": {
        "r": 4,
        "use_rslora": True,
        "rank_pattern": {r"layers\.[02]\.self_attn\..*": 2, "o_proj": 7, r"layers.1.*(gate|up)_proj": 6},
        "alpha_pattern": {r"model\.layers\.1\.mlp\.up_proj": 3, r".*\.2\..*": 9},
    },
    "first wins": {"r": 2, "rank_pattern": {".*proj": 3, "q_proj": 9}, "target_modules": ["q_proj", "k_proj"]},
    "one layer": {"r": 3, "layers_to_transform": 1},
    "layers": {"r": 3, "layers_to_transform": [2, 0], "target_modules": ["v_proj", "up_proj"]},
    "both": {"r": 2, "layers_to_transform": [1, 2], "rank_pattern": {"1.mlp.up_proj": 4}},
}


def spelled_out(settings: dict[str, Any]) -> dict[str, Any]:
    return {"lora_alpha": 16, "target_modules": list(PROJECTIONS), **settings}


@pytest.mark.parametrize("config", [LoraConfig, DoraConfig])
@pytest.mark.parametrize("case", SETTINGS)
def test_logits_and_gradients_equal_pefts(case: str, config: type[LoraConfig]) -> None:
    hf, model = base_pair()
    add_random_adapter(model, "qa", config(**SETTINGS[case]), seed=4)
    theirs = with_peft(hf, **spelled_out(SETTINGS[case]), use_dora=config is DoraConfig)
    copy_weights(model.adapter_state("qa"), their_weights(theirs))
    assert_same_step(theirs, model, "qa")


@pytest.mark.parametrize("case", SETTINGS)
def test_folders_go_both_ways(case: str, tmp_path: Path) -> None:
    hf, model = base_pair()
    theirs = with_peft(hf, **spelled_out(SETTINGS[case]))
    randomize(their_weights(theirs), seed=3, std=0.2)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    load_adapter(model, tmp_path / "theirs", "qa")
    expected = their_logits(theirs)
    assert_close(our_logits(model, "qa"), expected, 1e-4)
    config = LoraConfig(**SETTINGS[case])
    loaded = model.adapter_config("qa")
    for field in ("rank_pattern", "alpha_pattern", "use_rslora", "r"):
        assert getattr(loaded, field) == getattr(config, field)
    save_adapter(model, "qa", tmp_path / "ours")
    assert read_adapter_config(tmp_path / "ours") == dataclasses.replace(loaded, target_modules=loaded.targets)
    hf, _ = base_pair()
    again = peft.PeftModel.from_pretrained(hf, str(tmp_path / "ours")).eval()
    assert_close(our_logits(model, "qa"), their_logits(again), 1e-4)


def test_keys_match_as_pefts_do() -> None:
    from peft.utils.other import get_pattern_key

    keys = ["q_proj", "self_attn.k_proj", r".*\.1\..*", "layers.2", r"model\.layers\.0\.mlp\.(up|gate)_proj", "proj"]
    for layer in range(3):
        for projection in PROJECTIONS:
            path = module_path(layer, projection)
            for chosen in (keys, keys[::-1], *([key] for key in keys)):
                pattern = {key: index for index, key in enumerate(chosen)}
                assert value_at(pattern, path, -1) == pattern.get(get_pattern_key(chosen, path), -1)


def test_what_is_not_adapted_carries_nothing() -> None:
    model = tiny_model(tiny_config(num_hidden_layers=3))
    model.add_adapter("qa", LoraConfig(r=2, layers_to_transform=(1,), target_modules=["q_proj"]))
    carriers = [layer for layer, one in enumerate(model.layers) if "qa" in one.self_attn.q_proj.loras_]
    assert carriers == [1]
    assert {key.split(".layers.")[1][0] for key in model.adapter_state("qa")} == {"1"}


def test_fused_with_neighbours_it_is_itself() -> None:
    """Neighbours of other ranks, and layers on which only some have anything."""
    model = tiny_model(tiny_config(num_hidden_layers=3)).train()
    cases = {**{name.replace(" ", "_"): LoraConfig(**values, lora_dropout=0.2) for name, values in SETTINGS.items()}}
    runs = []
    for seed, (name, config) in enumerate(cases.items()):
        add_random_adapter(model, name, config, seed=seed)
        runs.append(random_run(name, (5, 3), seed=seed))
    outputs, found = run_step(model, *runs)
    for run, output in zip(runs, outputs, strict=True):
        (alone,), solo = run_step(model, run)
        assert_close(output.logits, alone.logits, 1e-5, run.adapter_name)
        for key, gradient in solo[run.adapter_name].items():
            assert_close(found[run.adapter_name][key], gradient, 1e-5, key)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\]=0 must be at least 1"),
        ({"rank_pattern": {"q_proj": "4"}}, r"rank_pattern\['q_proj'\]='4' must be int, not str"),
        ({"rank_pattern": {"(q_proj": 4}}, r"rank_pattern has '\(q_proj', which is no regular expression"),
        ({"rank_pattern": ["q_proj"]}, r"rank_pattern=\['q_proj'\] must be mapping of str to int, not list"),
        ({"rank_pattern": {3: 4}}, r"rank_pattern has the key 3 \(int\): keys are strings"),
        ({"alpha_pattern": {"q_proj": 0}}, r"alpha_pattern\['q_proj'\]=0.0 must be above 0"),
        ({"alpha_pattern": {"q_proj": True}}, r"alpha_pattern\['q_proj'\]=True must be float, not bool"),
        ({"layers_to_transform": []}, r"layers_to_transform=\[\] must name at least one layer"),
        ({"layers_to_transform": [1, 1]}, r"layers_to_transform=\[1, 1\] names a layer twice"),
        ({"layers_to_transform": -1}, "layers_to_transform has -1, which must be at least 0"),
        ({"layers_to_transform": "1"}, r"layers_to_transform='1' must be int \| list of int \| null, not str"),
        ({"layers_to_transform": True}, r"layers_to_transform=True must be int \| list of int \| null, not bool"),
    ],
    ids=str,
)
def test_values_outside_their_rules_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoraConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers_to_transform": 2}, r"layers_to_transform has 2, which must be in 0\.\.1: num_hidden_layers=2"),
        ({"layers_to_transform": [0, 9]}, r"layers_to_transform has 9, which must be in 0\.\.1"),
        ({"rank_pattern": {"q_prj": 4}}, "rank_pattern has 'q_prj', which matches no module .*; did you mean 'q_proj'"),
        ({"alpha_pattern": {"layers.2.*": 4}}, r"alpha_pattern has 'layers.2.\*', which matches no module"),
        (
            {"alpha_pattern": {"up_proj": 4}, "target_modules": ["q_proj"]},
            "alpha_pattern has 'up_proj', which matches no module that the adapter is on",
        ),
    ],
    ids=str,
)
def test_what_chooses_nothing_of_the_model_is_refused(fields: dict[str, Any], message: str) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        model.add_adapter("qa", LoraConfig(**fields))
    assert model.adapter_names == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank_pattern": {"q_proj": 4}}, r"rank_pattern=\{'q_proj': 4\} changes the adapter and is not supported for"),
        ({"alpha_pattern": {"q_proj": 4}}, r"alpha_pattern=\{'q_proj': 4.0\} changes the adapter and is not supported"),
        ({"layers_to_transform": 0}, "layers_to_transform=0 changes the adapter and is not supported for MIXLORA"),
        ({"layers_to_transform": [0, 1]}, r"layers_to_transform=\[0, 1\] changes the adapter and is not supported for"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' must be true, false or 'gaussian'"),
        ({"expert_lora": {"init_lora_weights": "olora"}}, "expert_lora.init_lora_weights='olora' must be true, false"),
    ],
    ids=str,
)
def test_a_mixture_refuses_them_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixLoraConfig(**fields)


@pytest.mark.parametrize("name", [name for name in CONFIGS if isinstance(CONFIGS[name], LoraConfig)])
def test_no_method_passes_over_them(name: str) -> None:
    """Whatever has LoRA's settings has them honoured, or refuses them."""
    fields = {"r": 3, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 3}, "layers_to_transform": 1}
    if CONFIGS[name].refused:
        assert set(CONFIGS[name].refused) == {"rank_pattern", "alpha_pattern", "layers_to_transform"}
        return
    model = tiny_model()
    config = dataclasses.replace(CONFIGS[name], target_modules=["q_proj", "v_proj"], **fields)
    model.add_adapter("qa", config)
    assert "qa" not in model.layers[0].self_attn.q_proj.loras_
    attention = model.layers[1].self_attn
    q_proj, v_proj = attention.q_proj.loras_["qa"], attention.v_proj.loras_["qa"]
    assert (q_proj.lora_A.shape[0], v_proj.lora_A.shape[0]) == (5, 3)
    root = 5**0.5 if config.use_rslora else 5
    assert q_proj.scaling_ == config.lora_alpha / root
    assert v_proj.scaling_ == pytest.approx(3 / (3**0.5 if config.use_rslora else 3))
    keys = [key for key in model.adapter_state("qa") if ".layers." in key]
    assert keys
    assert all(".layers.1." in key for key in keys)


def test_a_folder_of_another_architectures_layers_is_refused(tmp_path: Path) -> None:
    plain = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "layers_to_transform": [0, 0]}
    for pattern, is_here in ((None, True), ("layers", True), (["h", "layers"], True), ("", True), ("h", False)):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**plain, "layers_pattern": pattern}))
        if is_here:
            assert read_adapter_config(tmp_path).layers_to_transform == (0,)
            continue
        with pytest.raises(ValueError, match="layers_pattern='h' must be 'layers'"):
            read_adapter_config(tmp_path)


@pytest.mark.parametrize(
    "key",
    [
        "((a|.)*)*Z",
        r"(\w+\.?)+X",
        r"(\w|\.\w)*X",
        "(a?){65000}b",
        r"(?:(?:[a-z]+){2,}){3}",
        r"(?=(\w+)+X)q",
        ".*" * 5 + "Z",
        "(.*?)" * 10 + "Z",
    ],
)
@pytest.mark.parametrize(("field", "value"), [("rank_pattern", 4), ("alpha_pattern", 4.0)])
def test_an_expression_that_could_take_forever_is_refused(field: str, value: float, key: str) -> None:
    with pytest.raises(ValueError, match=f"^{field} has {re.escape(repr(key))}, which could take forever to match"):
        LoraConfig(r=2, **{field: {key: value}})


@pytest.mark.parametrize("key", ["(" * 5000, "a{99999999999999999999}"], ids=["deep", "often"])
def test_an_expression_that_cannot_be_read_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="which is no regular expression: "):
        LoraConfig(r=2, rank_pattern={key: 4})


@pytest.mark.parametrize(
    "key",
    [
        r".*\.layers\.[0-9]+\.self_attn\.[qkv]_proj",
        r"model\.layers\.(?:0|1|2|30|31)\.(?:self_attn|mlp)\..*",
        r"layers\.(\d\.|\d\d\.)?.*",
        ".*layers.*mlp.*proj.*",
        "|".join(f"layers.{layer}.*q_proj" for layer in range(200)),
        r"(?!.*up).*(q|v)_proj",
        "(q)?_?(?(1)x|.*)",
    ],
)
def test_what_people_write_is_quick_enough(key: str) -> None:
    LoraConfig(r=2, rank_pattern={key: 4})


def test_few_layers_stand_for_all() -> None:
    """The mean rank of all layers, on each projection: what the trial layers hold is what all hold on average."""
    config = LoraConfig(
        r=4,
        target_modules=["q_proj", "up_proj"],
        layers_to_transform=(1, 7),
        rank_pattern={r"7\.mlp.*": 20, "q_proj": 9},
        alpha_pattern={"7.*": 3},
    )
    trial = config.on_few_layers(8)
    model = tiny_model(tiny_config(num_hidden_layers=3))
    model.add_adapter("qa", trial)
    for layer in model.layers:
        assert layer.self_attn.q_proj.loras_["qa"].lora_A.shape[0] == 3  # ceil((9 + 9) / 8)
        assert layer.mlp.up_proj.loras_["qa"].lora_A.shape[0] == 3  # (4 + 20) / 8
    assert LoraConfig(r=4).on_few_layers(8) == LoraConfig(r=4)
    assert LoraConfig(r=4, init_lora_weights="olora").on_few_layers(8).init_lora_weights == "pissa_niter_0"
    assert torch.isfinite(model(fuse(random_run("qa", (4,))))[0].loss)


def test_in_a_run_s_config(tmp_path: Path) -> None:
    """From a file, an override and a sweep, and printed so that it is read again."""
    (tmp_path / "run.yaml").write_text(
        "base_model: x\nadapters:\n  - name: qa\n    method: lora\n    data: d.jsonl\n    lora_alpha: 4\n"
        "    rank_pattern:\n      q_proj: 3\n      layers.1.*up_proj: 5\n    layers_to_transform: 1\n"
    )
    config = TrainConfig.from_file(tmp_path / "run.yaml")
    assert config.adapters[0].adapter == LoraConfig(
        lora_alpha=4, rank_pattern={"q_proj": 3, "layers.1.*up_proj": 5}, layers_to_transform=1
    )
    assert TrainConfig.from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config
    changed = TrainConfig.from_file(
        tmp_path / "run.yaml",
        ["adapters.qa.rank_pattern={v_proj: 7}", "adapters.*.alpha_pattern=[{}, {q_proj: 2}]", "defaults.r=6"],
    )
    assert [job.adapter.alpha_pattern for job in changed.adapters] == [{}, {"q_proj": 2.0}]
    assert {job.adapter.rank_pattern["v_proj"] for job in changed.adapters} == {7}
    assert [job.name for job in changed.adapters] == ["qa-alpha_pattern_none", "qa-alpha_pattern_q_proj_2"]
    assert "rank_pattern: mapping of str to int = {}" in config_reference()
    with pytest.raises(ValueError, match=r"adapters\[0\]\.rank_pattern\['q_proj'\]='x' must be int, not str"):
        TrainConfig.from_file(tmp_path / "run.yaml", ["adapters.0.rank_pattern={q_proj: x}"])
