"""Every setting outside its rule is refused by field, value and rule; the rest resolves as PEFT resolves it."""

import dataclasses
import math

import peft
import pytest

from moe_peft import LoraConfig, MixLoraConfig
from moe_peft.adapters import METHODS

# Those that have LoRA's settings.
LORA_METHODS = [name for name, config in METHODS.items() if issubclass(config, LoraConfig)]
NAN, INF = float("nan"), float("inf")
REFUSED = [
    ({"r": 0}, "r=0 must be at least 1"),
    ({"r": -2}, "r=-2"),
    ({"lora_alpha": 0}, "lora_alpha=0.0 must be above 0"),
    ({"lora_alpha": -1.5}, "lora_alpha=-1.5"),
    ({"lora_alpha": NAN}, "lora_alpha=nan"),
    ({"lora_alpha": INF}, "lora_alpha=inf"),
    ({"lora_dropout": 1.0}, r"lora_dropout=1.0 must be in \[0, 1\)"),
    ({"lora_dropout": -0.1}, "lora_dropout=-0.1"),
    ({"lora_dropout": NAN}, "lora_dropout=nan"),
    ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq' must be true, false or 'gaussian'"),
    ({"target_modules": ()}, r"target_modules=\(\) must be 'all-linear' or a list of q_proj, k_proj"),
    ({"target_modules": ""}, "target_modules='' must be"),
    ({"target_modules": "q_proj"}, "target_modules='q_proj' must be 'all-linear' or a list"),
    ({"target_modules": "all_linear"}, "did you mean 'all-linear'"),
    ({"target_modules": ["q_prj"]}, "target_modules has 'q_prj', .* did you mean 'q_proj'"),
    ({"target_modules": ["q_proj", "lm_head"]}, "target_modules has 'lm_head'"),
    ({"target_modules": ["w1"]}, "target_modules has 'w1'"),
    ({"target_modules": [3]}, "target_modules\\[0\\]=3 must be str"),
    ({"target_modules": ["all-linear"]}, "target_modules has 'all-linear'"),
    ({"target_modules": ["q_proj", "v_proj", "q_proj"]}, "names a module twice"),
]
MIX_REFUSED = [
    ({"num_experts": 0}, r"num_experts=0 must be in 1..64"),
    ({"num_experts": 65}, r"num_experts=65 must be in 1..64"),
    ({"top_k": 0}, r"top_k=0 must be in 1..num_experts=8"),
    ({"top_k": 9}, r"top_k=9 must be in 1..num_experts=8"),
    ({"num_experts": 1}, r"top_k=2 must be in 1..num_experts=1"),
    ({"router_aux_loss_type": "balanced"}, "router_aux_loss_type='balanced' must be one of balance, balance_per_layer"),
    ({"router_aux_loss_coef": -0.1}, "router_aux_loss_coef=-0.1 must be at least 0"),
    ({"router_aux_loss_coef": NAN}, "router_aux_loss_coef=nan"),
    ({"router_aux_loss_coef": INF}, "router_aux_loss_coef=inf"),
    ({"router_z_loss_coef": -1}, "router_z_loss_coef=-1"),
    ({"router_z_loss_coef": INF}, "router_z_loss_coef=inf"),
    ({"router_init_range": -0.02}, "router_init_range=-0.02"),
    ({"router_init_range": INF}, "router_init_range=inf"),
    ({"router_jitter_noise": 1.0}, r"router_jitter_noise=1.0 must be in \[0, 1\)"),
    ({"router_jitter_noise": -0.5}, "router_jitter_noise=-0.5"),
    ({"router_jitter_noise": NAN}, "router_jitter_noise=nan"),
    ({"target_modules": ["q_proj", "o_proj"]}, "must name at least one of gate_proj, up_proj, down_proj"),
]


@pytest.mark.parametrize("method", LORA_METHODS)
@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_refused(method, fields, message):
    with pytest.raises(ValueError, match=message):
        METHODS[method](**fields)


@pytest.mark.parametrize(("fields", "message"), MIX_REFUSED)
def test_mixlora_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        MixLoraConfig(**fields)


@pytest.mark.parametrize("method", LORA_METHODS)
def test_edges_of_the_rules_are_accepted(method):
    METHODS[method](r=1, lora_alpha=1e-3, lora_dropout=0.0, target_modules=["down_proj"], init_lora_weights=False)
    METHODS[method](r=4096, lora_dropout=0.999, init_lora_weights="gaussian")
    if method == "mixlora":
        METHODS[method](num_experts=64, top_k=64, router_jitter_noise=0.999, router_init_range=0)
        METHODS[method](num_experts=1, top_k=1, router_aux_loss_coef=0, router_z_loss_coef=0)


@pytest.mark.parametrize("config", [LoraConfig(), MixLoraConfig()])
def test_frozen_and_keyword_only(config):
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.r = 4
    with pytest.raises(TypeError):
        type(config)(8)
    with pytest.raises(TypeError, match="lora_aplha"):
        type(config)(lora_aplha=8)
    assert all(item.metadata.get("help") for item in dataclasses.fields(config)), "every setting explains itself"


def test_defaults():
    """The issue's: r=8, alpha 16, no dropout; a balance loss of 1e-2, the paper's."""
    config = MixLoraConfig()
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (8, 16, 0.0, False)
    assert (config.num_experts, config.top_k, config.router_jitter_noise) == (8, 2, 0.0)
    assert (config.router_aux_loss_coef, config.router_aux_loss_type, config.router_z_loss_coef) == (1e-2, "balance", 0)
    assert config.target_modules == "all-linear"


def test_targets_come_in_the_models_order():
    assert LoraConfig().targets == ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    config = MixLoraConfig(target_modules=["down_proj", "v_proj", "gate_proj", "q_proj"])
    assert config.targets == ("q_proj", "v_proj", "gate_proj", "down_proj")
    assert config.attention_targets == ("q_proj", "v_proj")
    assert config.expert_targets == ("gate_proj", "down_proj")
    assert config.target_modules == ("down_proj", "v_proj", "gate_proj", "q_proj")  # as the user wrote it


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize(("r", "lora_alpha"), [(8, 16), (3, 7.5), (64, 1)])
def test_scaling(r, lora_alpha, use_rslora):
    scaling = LoraConfig(r=r, lora_alpha=lora_alpha, use_rslora=use_rslora).scaling
    assert scaling == lora_alpha / (math.sqrt(r) if use_rslora else r)


def test_fields_are_pefts():
    theirs = {item.name for item in dataclasses.fields(peft.LoraConfig)}
    assert {item.name for item in dataclasses.fields(LoraConfig)} <= theirs
