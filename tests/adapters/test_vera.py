"""VeRA: outputs, gradients, folders and merged weights equal those of the real peft."""

import json

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
    tiny_model,
)
from safetensors.torch import load_file, save_file
from torch import nn

from moe_peft import LoraConfig, VeraConfig, load_adapter, save_adapter
from moe_peft.adapters.lora import PROJECTIONS, target_linears
from moe_peft.adapters.vera import VeraProjections
from moe_peft.io.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from moe_peft.model.draws import dropout_mask

SETTINGS = {
    "all": {"r": 5, "target_modules": list(PROJECTIONS)},
    "another key": {"r": 3, "projection_prng_key": 7, "target_modules": ["q_proj", "down_proj"]},
    "one layer": {"r": 4, "target_modules": ["k_proj", "up_proj"], "layers_to_transform": [1]},
    "one layer, not in a list": {"r": 4, "target_modules": ["k_proj", "up_proj"], "layers_to_transform": 0},
    **{name: {"r": 2, "target_modules": [name]} for name in PROJECTIONS},
}
MARKS = ("vera_lambda",)
WITHOUT = pytest.mark.filterwarnings("ignore:Specified to not (save|load) vera_A:UserWarning")
INPUTS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "attn_in"),
    **dict.fromkeys(("gate_proj", "up_proj"), "mlp_in"),
    "o_proj": "attn_out",
    "down_proj": "mlp_hidden",
}


def projections(model):
    return [module for module in model.modules() if isinstance(module, VeraProjections)]


@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "mlp_bias": True, "head_dim": 10}], ids=str)
@pytest.mark.parametrize("case", SETTINGS)
def test_logits_and_gradients_equal_pefts(case, changes):
    ours, theirs = VeraConfig(**SETTINGS[case]), peft.VeraConfig(**SETTINGS[case])
    theirs, model, live = peft_twin.pair(ours, theirs, **changes)
    expected, expected_loss = peft_twin.logits_and_loss(theirs)
    (output,) = model.train()(fuse(Run("qa", peft_twin.SAMPLES)), return_logits=True)
    backward([output])
    assert_close(output.logits, expected, 1e-4, "logits")
    assert_close(output.loss, expected_loss, 1e-5, "loss")
    for name, gradient in gradients(model, "qa").items():
        assert live[name].grad.abs().max() > 0, name
        assert_close(gradient, live[name].grad, 1e-4, name)
    assert (peft_twin.our_logits(model, "") - expected).abs().max() > 1e-2  # the adapter acts


@pytest.mark.parametrize("case", ["all", "one layer"])
def test_float64_gradients_equal_pefts(case):
    """transformers' norms and softmax stay float32 in a float64 model, hence 1e-5."""
    ours, theirs = VeraConfig(**SETTINGS[case]), peft.VeraConfig(**SETTINGS[case])
    theirs, model, live = peft_twin.pair(ours, theirs, dtype=torch.float64)
    expected, _ = peft_twin.logits_and_loss(theirs)
    (output,) = model(fuse(Run("qa", peft_twin.SAMPLES)), return_logits=True)
    backward([output])
    assert_close(output.logits, expected, 1e-5, "logits")
    for name, gradient in gradients(model, "qa").items():
        assert gradient.dtype == torch.float64
        assert_close(gradient, live[name].grad, 1e-5, name)


class Masked(nn.Module):
    """Dropout with a mask that is given."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, x):
        return x * self.mask


def test_dropout_with_the_same_masks_equals_pefts():
    settings = {"r": 5, "vera_dropout": 0.4, "target_modules": list(PROJECTIONS)}
    theirs, model, live = peft_twin.pair(VeraConfig(**settings), peft.VeraConfig(**settings))
    sample, like = peft_twin.SAMPLES[0], torch.zeros(())
    for layer_idx, projection, linear in target_linears(model, PROJECTIONS):
        key = (4, "qa", 3, 2, "dropout", layer_idx, INPUTS[projection])
        mask = dropout_mask((len(sample), linear.in_features), 0.4, like=like, key=key)
        room = "mlp" if projection in ("gate_proj", "up_proj", "down_proj") else "self_attn"
        layer = getattr(getattr(theirs.base_model.model.model.layers[layer_idx], room), projection)
        layer.vera_dropout["default"] = Masked(mask)
    expected = peft_twin.logits(theirs, [sample])
    nn.functional.cross_entropy(expected[:-1], torch.tensor(sample[1:])).backward()
    (output,) = model.train()(fuse(Run("qa", [sample], step=3, micro_batch=2)), return_logits=True)
    backward([output])
    assert_close(output.logits, expected, 1e-4, "logits")
    for name, gradient in gradients(model, "qa").items():
        assert_close(gradient, live[name].grad, 1e-4, name)
    assert (peft_twin.our_logits(model.eval(), "qa")[: len(sample)] - expected).abs().max() > 1e-2


@WITHOUT
@pytest.mark.parametrize("save_projection", [True, False])
@pytest.mark.parametrize("case", ["all", "another key", "one layer", "one layer, not in a list"])
def test_peft_computes_the_same_from_what_we_save(case, save_projection, tmp_path):
    config = VeraConfig(**SETTINGS[case], save_projection=save_projection)
    ours, theirs = peft_twin.logits_of_our_folder(config, tmp_path)
    assert_close(ours, theirs, 1e-4)
    saved = load_file(tmp_path / "qa" / WEIGHTS_FILE)
    assert ("base_model.vera_A" in saved, "base_model.vera_B" in saved) == (save_projection, save_projection)


@WITHOUT
@pytest.mark.parametrize("save_projection", [True, False])
@pytest.mark.parametrize("case", ["all", "another key", "one layer", "one layer, not in a list"])
def test_we_compute_the_same_from_what_peft_saves(case, save_projection, tmp_path):
    config = peft.VeraConfig(task_type="CAUSAL_LM", **SETTINGS[case], save_projection=save_projection)
    model, ours, theirs = peft_twin.logits_of_their_folder(config, tmp_path, MARKS)
    assert_close(ours, theirs, 1e-4)
    loaded, own = model.adapter_config("qa"), VeraConfig(**SETTINGS[case], save_projection=save_projection)
    assert (loaded.r, loaded.targets, loaded.layers) == (own.r, own.targets, own.layers)
    # It is the pair that the key gives, so an adapter that comes later shares it.
    model.add_adapter("later", own)
    assert len(projections(model)) == 1


@pytest.mark.parametrize("save_projection", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_save_and_load_gives_the_same_bits(dtype, save_projection, tmp_path):
    config = VeraConfig(r=6, save_projection=save_projection, layers_to_transform=[1], target_modules=["q_proj"])
    model, other = tiny_model(dtype=dtype), tiny_model(dtype=dtype)
    add_random_adapter(model, "qa", config)
    save_adapter(model, "qa", tmp_path / "qa")
    load_adapter(other, tmp_path / "qa")
    assert torch.equal(peft_twin.our_logits(model, "qa"), peft_twin.our_logits(other, "qa"))
    assert other.adapter_config("qa") == config


def test_initial_vectors():
    hf, model = peft_twin.bases()
    model.add_adapter("qa", VeraConfig(r=4, d_initial=0.25))
    for name, values in model.adapter_state("qa").items():
        assert values.unique().item() == (0.0 if name.endswith("lambda_b") else 0.25)
    assert torch.equal(peft_twin.our_logits(model, "qa"), peft_twin.our_logits(model, ""))
    theirs = peft.get_peft_model(hf, peft.VeraConfig(r=400, init_weights=False, target_modules=["q_proj"]))
    expected = {name.replace(".default", ""): w for name, w in theirs.named_parameters() if "vera_lambda" in name}
    state = torch.get_rng_state()
    model.add_adapter("random", VeraConfig(r=400, init_weights=False, target_modules=["q_proj"]), seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    for name, values in model.adapter_state("random").items():
        assert values.std(correction=0).item() == pytest.approx(expected[name].std(correction=0).item(), abs=0.15)
        assert values.mean().item() == pytest.approx(expected[name].mean().item(), abs=0.25)


def test_merged_weights_equal_pefts():
    ours, theirs = (kind(**SETTINGS["all"]) for kind in (VeraConfig, peft.VeraConfig))
    theirs, model, _ = peft_twin.pair(ours, theirs, attention_bias=True, mlp_bias=True)
    expected = dict(theirs.merge_and_unload().named_parameters())
    for layer_idx, projection, linear in target_linears(model, PROJECTIONS):
        base = linear.base_layer_
        weight, bias = linear.loras_["qa"].merged(base.weight, base.bias)
        (key,) = (key for key in expected if f"layers.{layer_idx}." in key and key.endswith(f"{projection}.weight"))
        assert_close(weight, expected[key], 1e-5, key)
        assert not torch.equal(weight, base.weight)
        assert torch.equal(bias, base.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_that_share_the_pair_share_nothing_else(dtype):
    model = tiny_model(dtype=dtype).train()
    configs = {
        "a": VeraConfig(r=4, vera_dropout=0.2),
        "b": VeraConfig(r=4, d_initial=0.3),
        "some": VeraConfig(r=7, target_modules=["q_proj", "gate_proj"], layers_to_transform=1),
        "low": LoraConfig(r=3, lora_dropout=0.1),
    }
    for i, (name, config) in enumerate(configs.items()):
        add_random_adapter(model, name, config, seed=i)
    runs = [random_run(name, (4, 6), seed=i, step=2) for i, name in enumerate(["a", "low", "b", "", "some"])]
    assert_nothing_is_shared(model, *runs)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "r=0 must be at least 1"),
        ({"vera_dropout": 1.0}, r"vera_dropout=1.0 must be in \[0, 1\)"),
        ({"projection_prng_key": -1}, r"projection_prng_key=-1 must be in 0..2\*\*63-1"),
        ({"projection_prng_key": 2**63}, r"projection_prng_key=\d+ must be in 0..2\*\*63-1"),
        ({"target_modules": ["q_prj"]}, r"target_modules has 'q_prj', .*did you mean 'q_proj'\?"),
        ({"layers_to_transform": [1, 1]}, r"layers_to_transform=\[1, 1\] names a layer twice"),
        ({"layers_to_transform": -1}, "layers_to_transform has -1, which must be at least 0"),
        ({"d_initial": "small"}, "d_initial='small' must be float"),
        ({"d_initial": 0}, r"d_initial=0\.0 must not be 0 with init_weights=true"),
    ],
)
def test_refused_settings(fields, message):
    with pytest.raises(ValueError, match=message):
        VeraConfig(**fields)


def test_a_folder_may_have_begun_with_zeros(tmp_path):
    """Random vectors beside them have gradients, and what stands in a folder no longer depends on its beginning."""
    model = tiny_model()
    add_random_adapter(model, "qa", VeraConfig(r=3, d_initial=0, init_weights=False), seed=3)
    save_adapter(model, "qa", tmp_path)
    load_adapter(model, tmp_path, "again")
    before, after = model.adapter_state("qa"), model.adapter_state("again")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("settings", [{"bias": "vera_only"}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_what_a_folder_may_not_ask_for(settings, tmp_path):
    hf, model = peft_twin.bases()
    config = peft.VeraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], **settings)
    peft.get_peft_model(hf, config).save_pretrained(str(tmp_path))
    with pytest.raises(
        ValueError, match=f"{next(iter(settings))}=.* changes the adapter and is not supported for VERA"
    ):
        load_adapter(model, tmp_path, "qa")
    assert model.adapter_names == []


def test_a_folder_that_lacks_its_pair_is_refused(tmp_path):
    model = tiny_model()
    model.add_adapter("qa", VeraConfig(r=2))
    save_adapter(model, "qa", tmp_path)
    weights = load_file(tmp_path / WEIGHTS_FILE)
    save_file({key: tensor for key, tensor in weights.items() if "vera_A" not in key}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(ValueError, match=r"lacks base_model\.vera_A"):
        load_adapter(model, tmp_path, "again")
    assert len(projections(model)) == 1


def test_a_trial_on_few_layers_has_the_share_of_the_chosen_ones():
    config = VeraConfig(r=10, layers_to_transform=[3, 17, 29])
    assert config.on_few_layers(30) == VeraConfig(r=1)
    assert config.on_few_layers(4) == VeraConfig(r=8)
    assert VeraConfig(r=10).on_few_layers(30) == VeraConfig(r=10)


def test_a_folder_whose_layers_are_called_otherwise_is_refused(tmp_path):
    model = tiny_model()
    model.add_adapter("qa", VeraConfig(r=2, layers_to_transform=[1]))
    save_adapter(model, "qa", tmp_path)
    settings = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps({**settings, "layers_pattern": "blocks"}))
    with pytest.raises(ValueError, match="layers_pattern='blocks' must be 'layers'"):
        load_adapter(model, tmp_path, "again")
    (tmp_path / CONFIG_FILE).write_text(
        json.dumps({**settings, "layers_pattern": "layers", "layers_to_transform": [1, 1]})
    )
    load_adapter(model, tmp_path, "again")
    assert model.adapter_config("again").layers == (1,)
