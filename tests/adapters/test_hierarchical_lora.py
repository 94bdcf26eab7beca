"""Hierarchical LoRA: equal to the sum of its levels written out, and to one that never had a level that is left out."""

import math

import pytest
import torch
from builders import add_random_adapter, assert_close, random_run, run_step, tiny_model
from naive_model import ATTENTION, NaiveModel, assert_same_as_naive
from safetensors.torch import load_file, save_file

from moe_peft import HierarchicalLoraConfig, LoraConfig, load_adapter, save_adapter
from moe_peft.adapters.lora import PROJECTIONS

RUN = random_run("qa", (5, 1, 7), seed=3, step=2, micro_batch=1)
SETTINGS = {
    "default": {},
    "alphas": {"ranks": [5, 1, 3], "alphas": [7, 0.5, 12], "lora_dropout": 0.3},
    "rslora": {"ranks": [3, 2], "lora_alpha": 5, "use_rslora": True, "target_modules": ["k_proj", "down_proj"]},
    "one": {"ranks": [4]},
    "part": {"ranks": [4, 3, 2, 1], "active_levels": [1, 3], "alphas": [1, 2, 3, 4]},
}


class NaiveLevels(NaiveModel):
    """Adds up the levels' products."""

    def update(self, layer, name, x, expert=None):
        config = self.adapter
        room = "self_attn" if name in ATTENTION else "mlp"
        total = 0.0
        for level, rank in enumerate(config.ranks):
            key = f"base_model.model.model.layers.{layer}.{room}.{name}.levels.{level}"
            if f"{key}.lora_A.weight" in self.weights:
                alpha = config.alphas[level] if config.alphas else config.lora_alpha
                scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
                factors = (self.weights[f"{key}.{factor}.weight"] for factor in ("lora_A", "lora_B"))
                lora_a, lora_b = factors
                assert lora_a.shape[0] == lora_b.shape[1] == rank
                total = total + scaling * (x @ lora_a.T @ lora_b.T)
        return total


@pytest.mark.parametrize("case", SETTINGS)
def test_equals_the_sum_of_its_levels(case):
    """Forward and every gradient, in training: one dropout mask for all levels."""
    config = HierarchicalLoraConfig(**SETTINGS[case])
    model = tiny_model(dtype=torch.float64).train()
    add_random_adapter(model, "qa", config, seed=5)
    naive = NaiveLevels(model, "qa", config, seed=5)
    assert len(naive.weights) == 2 * 2 * len(config.targets) * len(config.levels)
    assert_same_as_naive(model, naive, RUN)


def test_one_level_is_plain_lora_to_the_last_but_one_bit():
    """The same factors under LoRA's names; the scaling is in B, so that roundings may differ."""
    model = tiny_model()
    add_random_adapter(model, "qa", HierarchicalLoraConfig(ranks=[4]))
    model.add_adapter("plain", LoraConfig(r=4))
    for key, weight in model.adapter_state("plain").items():
        weight.copy_(model.adapter_state("qa")[key.replace("lora_", "levels.0.lora_")])
    ours, plain = (random_run(name, (5, 3), seed=1) for name in ("qa", "plain"))
    assert_close(run_step(model, ours)[0][0].logits, run_step(model, plain)[0][0].logits, 1e-6)


def test_a_level_draws_the_same_whichever_others_there_are():
    def drawn(**settings):
        model = tiny_model()
        model.add_adapter("qa", HierarchicalLoraConfig(ranks=[4, 4, 2], **settings), seed=3)
        return model.adapter_state("qa")

    whole, part = drawn(), drawn(active_levels=[1])
    assert {key for key in whole if ".levels.1." in key} == part.keys()
    assert all(torch.equal(weight, whole[key]) for key, weight in part.items())
    first, second = (whole[f"base_model.model.model.layers.0.mlp.up_proj.levels.{i}.lora_A.weight"] for i in (0, 1))
    assert not torch.equal(first, second)
    assert not any(weight.any() for key, weight in whole.items() if "lora_B" in key)


def saved(tmp_path, **settings):
    model = tiny_model()
    add_random_adapter(model, "qa", HierarchicalLoraConfig(ranks=[5, 3, 2], lora_alpha=6, **settings))
    save_adapter(model, "qa", tmp_path / "qa")
    return model, tmp_path / "qa"


@pytest.mark.parametrize("levels", [[0], [2], [0, 2], [1, 2], [0, 1, 2]])
def test_levels_left_out_when_loading(levels, tmp_path):
    """What is left has every bit, in logits and gradients, of an adapter that never had the others."""
    model, folder = saved(tmp_path, lora_dropout=0.2)
    other = tiny_model().train()
    load_adapter(other, folder, seed=1, settings={"active_levels": levels})
    assert other.adapter_config("qa").active_levels == tuple(levels)
    never = tiny_model().train()
    never.add_adapter(
        "qa", HierarchicalLoraConfig(ranks=[(5, 3, 2)[i] for i in levels], lora_alpha=6, lora_dropout=0.2), seed=1
    )
    state = model.adapter_state("qa")
    for key, weight in never.adapter_state("qa").items():
        level = int(key.split(".levels.")[1].split(".")[0])
        weight.copy_(state[key.replace(f".levels.{level}.", f".levels.{levels[level]}.")])
    (output,), found = run_step(other, RUN)
    (expected,), gradients = run_step(never, RUN)
    assert torch.equal(output.logits, expected.logits)
    for left, right in zip(found["qa"].values(), gradients["qa"].values(), strict=True):
        assert torch.equal(left, right)
    if len(levels) < 3:
        load_adapter(other, folder, "whole", seed=1)
        whole = run_step(other, random_run("whole", (5, 1, 7), seed=3))[0][0].logits
        assert (whole - output.logits).abs().max() > 1e-2


def test_a_part_is_saved_as_the_part_that_it_is(tmp_path):
    _, folder = saved(tmp_path)
    model, other = tiny_model(), tiny_model()
    load_adapter(model, folder, settings={"active_levels": [0, 2]})
    save_adapter(model, "qa", tmp_path / "part")
    assert not any(".levels.1." in key for key in load_file(tmp_path / "part" / "adapter_model.safetensors"))
    load_adapter(other, tmp_path / "part", "qa")
    config = HierarchicalLoraConfig(ranks=[5, 3, 2], lora_alpha=6, active_levels=[0, 2], target_modules=PROJECTIONS)
    assert other.adapter_config("qa") == config
    assert torch.equal(run_step(other, RUN)[0][0].logits, run_step(model, RUN)[0][0].logits)
    with pytest.raises(ValueError, match=r"lacks .*levels\.1\."):
        load_adapter(other, tmp_path / "part", "new", settings={"active_levels": [1, 2]})
    assert other.adapter_names == ["qa"]


def test_merging_adds_every_level():
    model = tiny_model(dtype=torch.float64)
    add_random_adapter(model, "qa", HierarchicalLoraConfig(ranks=[5, 2], alphas=[3, 8]))
    linear = model.decoder_layers[1].self_attn.v_proj
    weight, _ = linear.loras_["qa"].merged(linear.base_layer_.weight, None)
    prefix = "base_model.model.model.layers.1.self_attn.v_proj.levels"
    state = model.adapter_state("qa")
    delta = sum(
        scaling * state[f"{prefix}.{i}.lora_B.weight"] @ state[f"{prefix}.{i}.lora_A.weight"]
        for i, scaling in enumerate((3 / 5, 8 / 2))
    )
    assert_close(weight, linear.base_layer_.weight + delta, 1e-12)


def test_all_but_levels_left_out_is_as_strict_as_ever(tmp_path):
    _, folder = saved(tmp_path)
    path = folder / "adapter_model.safetensors"
    weights, model = load_file(path), tiny_model()
    key = "base_model.model.model.layers.0.mlp.up_proj.levels.{}.lora_A.weight"
    save_file({**weights, key.format(3): torch.ones(2, 24)}, path)
    with pytest.raises(ValueError, match=r"has .*levels\.3\."):
        load_adapter(model, folder, settings={"active_levels": [0]})
    save_file({name: weight for name, weight in weights.items() if name != key.format(1)}, path)
    with pytest.raises(ValueError, match=r"lacks .*levels\.1\."):
        load_adapter(model, folder)
    load_adapter(model, folder, settings={"active_levels": [0, 2]})  # what is missing is not asked for


def test_settings_in_place_of_the_folders(tmp_path):
    """Of any method: honoured, or refused by name."""
    model = tiny_model()
    add_random_adapter(model, "qa", LoraConfig(r=2))
    save_adapter(model, "qa", tmp_path / "qa")
    load_adapter(model, tmp_path / "qa", "half", settings={"lora_alpha": 8, "lora_dropout": 0.5})
    config = model.adapter_config("half")
    assert (config.r, config.lora_alpha, config.lora_dropout) == (2, 8, 0.5)
    delta, half = (model.decoder_layers[0].mlp.up_proj.loras_[name].scaling_ for name in ("qa", "half"))
    assert half == delta / 2
    for settings, message in [
        ({"active_levels": [0]}, r"settings.active_levels=\[0\] is not a known key"),
        ({"lora_aplha": 3}, "settings.lora_aplha=3 is not a known key; did you mean 'lora_alpha'"),
        ({"lora_dropout": 2.0}, r"lora_dropout=2.0 must be in \[0, 1\)"),
        ({"r": 3}, "has shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_adapter(model, tmp_path / "qa", "new", settings=settings)
    assert model.adapter_names == ["qa", "half"]


REFUSED = [
    ({"ranks": []}, r"ranks=\[\] must be a list of ranks of at least 1"),
    ({"ranks": [4, 0]}, r"ranks=\[4, 0\] must be"),
    ({"ranks": 8}, "ranks=8 must be list of int"),
    ({"alphas": [1.0]}, r"alphas=\[1.0\] must be as many as ranks=\[16, 8, 4\]"),
    ({"alphas": [1, 0, 1]}, r"alphas=\[1.0, 0.0, 1.0\] must all be above 0"),
    ({"alphas": [1, 2, 3], "lora_alpha": 8}, r"lora_alpha=8.0 changes nothing beside alphas=\[1.0, 2.0, 3.0\]"),
    ({"lora_alpha": 0}, "lora_alpha=0.0 must be above 0"),
    ({"lora_dropout": 1.0}, r"lora_dropout=1.0 must be in \[0, 1\)"),
    ({"target_modules": ["q_prj"]}, "did you mean 'q_proj'"),
    ({"active_levels": []}, r"active_levels=\[\] must be a list of places in 0..2 of ranks=\[16, 8, 4\]"),
    ({"active_levels": [3]}, r"active_levels=\[3\] must be a list of places in 0..2"),
    ({"active_levels": [-1]}, r"active_levels=\[-1\] must be"),
    ({"active_levels": [1, 0]}, r"active_levels=\[1, 0\] must name each level once, in rising order"),
    ({"active_levels": [1, 1]}, r"active_levels=\[1, 1\] must name each level once"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        HierarchicalLoraConfig(**fields)
