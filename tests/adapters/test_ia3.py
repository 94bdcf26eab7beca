"""(IA)³: outputs, gradients, folders and merged weights equal those of the real peft."""

import json
from pathlib import Path

import peft
import peft_twin
import pytest
import torch
from builders import (
    Run,
    add_random_adapter,
    assert_close,
    assert_nothing_is_shared,
    backward,
    fuse,
    gradients,
    random_run,
    tiny_config,
    tiny_model,
)
from safetensors.torch import load_file, save_file

from moe_peft import IA3Config, LoraConfig, load_adapter, save_adapter
from moe_peft.adapters.lora import PROJECTIONS
from moe_peft.config import AdapterJob
from moe_peft.io.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from moe_peft.training.optimizer import build_optimizer

DEFAULT = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
SETTINGS = {
    "default": DEFAULT,
    **{f"{name}, output": {"target_modules": [name], "feedforward_modules": []} for name in PROJECTIONS},
    **{f"{name}, input": {"target_modules": [name], "feedforward_modules": [name]} for name in PROJECTIONS},
    "every output": {"target_modules": list(PROJECTIONS), "feedforward_modules": []},
    "every input": {"target_modules": list(PROJECTIONS), "feedforward_modules": list(PROJECTIONS)},
    "some that share": {"target_modules": list(PROJECTIONS), "feedforward_modules": ["k_proj", "up_proj"]},
}
BIASED = {"attention_bias": True, "mlp_bias": True}


@pytest.mark.parametrize("case", SETTINGS)
def test_logits_and_gradients_equal_pefts(case):
    theirs, model, live = peft_twin.pair(IA3Config(**SETTINGS[case]), peft.IA3Config(**SETTINGS[case]), **BIASED)
    expected, expected_loss = peft_twin.logits_and_loss(theirs)
    (output,) = model.train()(fuse(Run("qa", peft_twin.SAMPLES)), return_logits=True)
    backward([output])
    assert_close(output.logits, expected, 1e-4, "logits")
    assert_close(output.loss, expected_loss, 1e-5, "loss")
    for name, gradient in gradients(model, "qa").items():
        assert live[name].grad.abs().max() > 0, name
        assert_close(gradient, live[name].grad.flatten(), 1e-4, name)
    assert (peft_twin.our_logits(model, "") - expected).abs().max() > 1e-2  # the adapter acts


@pytest.mark.parametrize("case", ["default", "every output", "some that share"])
def test_float64_gradients_equal_pefts(case):
    """transformers' norms and softmax stay float32 in a float64 model, hence 1e-5."""
    ours, theirs = IA3Config(**SETTINGS[case]), peft.IA3Config(**SETTINGS[case])
    theirs, model, live = peft_twin.pair(ours, theirs, dtype=torch.float64, **BIASED)
    expected, _ = peft_twin.logits_and_loss(theirs)
    (output,) = model(fuse(Run("qa", peft_twin.SAMPLES)), return_logits=True)
    backward([output])
    assert_close(output.logits, expected, 1e-5, "logits")
    for name, gradient in gradients(model, "qa").items():
        assert gradient.dtype == torch.float64
        assert_close(gradient, live[name].grad.flatten(), 1e-5, name)


@pytest.mark.parametrize("case", ["default", "some that share", "o_proj, output", "up_proj, input"])
def test_peft_computes_the_same_from_what_we_save(case, tmp_path):
    ours, theirs = peft_twin.logits_of_our_folder(IA3Config(**SETTINGS[case]), tmp_path, **BIASED)
    assert_close(ours, theirs, 1e-4)


@pytest.mark.parametrize("case", ["default", "some that share", "o_proj, output", "up_proj, input"])
def test_we_compute_the_same_from_what_peft_saves(case, tmp_path):
    config = peft.IA3Config(task_type="CAUSAL_LM", **SETTINGS[case])
    model, ours, theirs = peft_twin.logits_of_their_folder(config, tmp_path, ("ia3_l",), **BIASED)
    assert_close(ours, theirs, 1e-4)
    own = IA3Config(**SETTINGS[case])
    loaded = model.adapter_config("qa")
    assert (loaded.targets, loaded.feedforward) == (own.targets, own.feedforward)


def test_the_defaults_are_pefts():
    """It names down_proj as a feed-forward module even where that is no target, and keeps it so in the folder."""
    hf, model = peft_twin.bases()
    theirs = peft.get_peft_model(hf, peft.IA3Config(task_type="CAUSAL_LM")).peft_config["default"]
    assert theirs.target_modules == set(IA3Config().targets)
    assert theirs.feedforward_modules == set(IA3Config().feedforward)
    model.add_adapter("qa", IA3Config())
    assert {weight.unique().item() for weight in model.adapter_state("qa").values()} == {1.0}


def test_a_folder_whose_feedforward_modules_are_no_targets(tmp_path):
    config = peft.IA3Config(task_type="CAUSAL_LM", target_modules=["self_attn.q_proj", "mlp.up_proj"])
    model, ours, theirs = peft_twin.logits_of_their_folder(config, tmp_path, ("ia3_l",))
    assert json.loads((tmp_path / "qa" / CONFIG_FILE).read_text())["feedforward_modules"] == ["down_proj"]
    assert_close(ours, theirs, 1e-4)
    assert model.adapter_config("qa").targets == ("q_proj", "up_proj")
    assert model.adapter_config("qa").feedforward == ()


def test_names_and_shapes_of_a_folder(tmp_path):
    model = tiny_model()
    model.add_adapter("qa", IA3Config())
    save_adapter(model, "qa", tmp_path / "qa")
    assert {key: tuple(tensor.shape) for key, tensor in load_file(tmp_path / "qa" / WEIGHTS_FILE).items()} == {
        f"base_model.model.model.layers.{layer}.{name}.ia3_l": shape
        for layer in range(2)
        for name, shape in [
            ("self_attn.k_proj", (12, 1)),
            ("self_attn.v_proj", (12, 1)),
            ("mlp.down_proj", (1, 38)),
        ]
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_save_and_load_gives_the_same_bits(dtype, tmp_path):
    config = IA3Config(**SETTINGS["some that share"])
    model, other = tiny_model(dtype=dtype), tiny_model(dtype=dtype)
    add_random_adapter(model, "qa", config)
    save_adapter(model, "qa", tmp_path / "qa")
    load_adapter(other, tmp_path / "qa")
    assert torch.equal(peft_twin.our_logits(model, "qa"), peft_twin.our_logits(other, "qa"))
    assert other.adapter_config("qa") == config


def test_init_draws_from_the_adapters_own_seed():
    models = [tiny_model() for _ in range(3)]
    state = torch.get_rng_state()
    drawn = []
    for model, seed in zip(models, (3, 3, 4), strict=True):
        model.add_adapter("qa", IA3Config(init_ia3_weights=False), seed=seed)
        drawn.append(torch.cat(list(model.adapter_state("qa").values())))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert 0.8 < drawn[0].std() < 1.2
    assert drawn[0].mean().abs() < 0.3


@pytest.mark.parametrize("case", ["every output", "every input", "some that share"])
def test_merged_weights_equal_pefts(case):
    theirs, model, _ = peft_twin.pair(IA3Config(**SETTINGS[case]), peft.IA3Config(**SETTINGS[case]), **BIASED)
    expected = dict(theirs.merge_and_unload().named_parameters())
    changed = 0
    for i, layer in enumerate(model.decoder_layers):
        for room in ("self_attn", "mlp"):
            for name, linear in getattr(layer, room).named_children():
                if name not in PROJECTIONS:
                    continue
                base = linear.base_layer_
                weight, bias = linear.loras_["qa"].merged(base.weight, base.bias)
                prefix = f"model.layers.{i}.{room}.{name}"
                assert_close(weight, expected[f"{prefix}.weight"], 1e-6, prefix)
                assert_close(bias, expected[f"{prefix}.bias"], 1e-6, prefix)
                changed += not torch.equal(weight, base.weight)
    assert changed == 2 * len(PROJECTIONS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_neighbours_change_nothing(dtype):
    """Adapters that scale inputs beside such that do not, in one batch; a NaN in one of them reaches nobody."""
    configs = {name: IA3Config(**SETTINGS[name]) for name in ("default", "every input", "some that share")}
    model = tiny_model(tiny_config(**BIASED), dtype=dtype).train()
    names = {f"ia3-{i}": config for i, config in enumerate(configs.values())} | {"low": LoraConfig(r=3)}
    for i, (name, config) in enumerate(names.items()):
        add_random_adapter(model, name, config, seed=i)
    runs = [random_run(name, (4, 6), seed=i) for i, name in enumerate(["ia3-1", "", "low", "ia3-0", "ia3-2"])]
    assert_nothing_is_shared(model, *runs)


def test_factors_are_spared_by_weight_decay():
    """It would pull them towards 0, and the base model's features with them."""
    model = tiny_model()
    model.add_adapter("qa", IA3Config())
    job = AdapterJob(name="qa", method="ia3", adapter=IA3Config(), data="x.jsonl", weight_decay=0.1)
    groups = build_optimizer(model, job).param_groups
    assert [(group["weight_decay"], len(group["params"])) for group in groups] == [(0.0, 6)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["k_prj"]}, r"target_modules has 'k_prj', .*did you mean 'k_proj'\?"),
        ({"target_modules": []}, r"target_modules=\(\) must be 'all-linear' or a list"),
        (
            {"target_modules": ["k_proj", "up_proj"], "feedforward_modules": ["p_proj"]},
            r"feedforward_modules has 'p_proj', but must be of the target_modules k_proj, up_proj; did you mean 'up_",
        ),
        ({"feedforward_modules": ["q_proj"]}, r"feedforward_modules has 'q_proj', but must be of the target_modules"),
        ({"feedforward_modules": ["down_proj", "down_proj"]}, r"feedforward_modules=.* names a module twice"),
        ({"feedforward_modules": "down_proj"}, "feedforward_modules='down_proj' must be list of str"),
        ({"init_ia3_weights": "gaussian"}, "init_ia3_weights='gaussian' must be bool"),
    ],
)
def test_refused_settings(fields, message):
    with pytest.raises(ValueError, match=message):
        IA3Config(**fields)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"exclude_modules": ["v_proj"]}, "exclude_modules"), ({"modules_to_save": ["lm_head"]}, "modules_to_save")],
)
def test_what_a_folder_may_not_ask_for(settings, message, tmp_path):
    hf, model = peft_twin.bases()
    peft.get_peft_model(hf, peft.IA3Config(task_type="CAUSAL_LM", **settings)).save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match=f"{message}=.* changes the adapter and is not supported for IA3"):
        load_adapter(model, tmp_path, "qa")
    assert model.adapter_names == []


def test_a_folder_with_factors_of_the_wrong_side(tmp_path: Path):
    model = tiny_model()
    model.add_adapter("qa", IA3Config())
    save_adapter(model, "qa", tmp_path)
    weights = load_file(tmp_path / WEIGHTS_FILE)
    key = "base_model.model.model.layers.0.mlp.down_proj.ia3_l"
    save_file({**weights, key: weights[key].T.contiguous()}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(
        ValueError, match=r"down_proj.ia3_l has shape \[38, 1\], but must have \[1, I\], factors of an in"
    ):
        load_adapter(model, tmp_path, "again")
    assert model.adapter_names == ["qa"]
