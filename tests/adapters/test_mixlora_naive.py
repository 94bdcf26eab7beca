"""MixLoRA's outputs, router losses and every gradient equal those of a per-token, per-expert loop in float64."""

import itertools

import pytest
import torch
from builders import add_random_adapter, assert_close, backward, fuse, gradients, random_run, tiny_config, tiny_model
from naive_model import NaiveModel

from moe_peft import MixLoraConfig
from moe_peft.adapters.lora import ATTENTION_PROJECTIONS, FFN_PROJECTIONS

SEED = 7
SUBSETS = [subset for size in (1, 2, 3) for subset in itertools.combinations(FFN_PROJECTIONS, size)]
COEFS = {"router_aux_loss_coef": 0.7, "router_z_loss_coef": 0.3}


def make_model(adapter, *, training, **config):
    model = tiny_model(tiny_config(**config), dtype=torch.float64)
    add_random_adapter(model, "qa", adapter, seed=SEED)
    return model.train(training)


def compare(adapter, lengths=(4, 1, 6), *, training=True, expert=None, **config):
    """Everything the model returns and every gradient; returns both sides for more."""
    model = make_model(adapter, training=training, **config)
    name = "qa" if expert is None else f"moe.qa.experts.{expert}"
    run = random_run(name, lengths, seed=3, step=5, micro_batch=2)
    (output,) = model(fuse(run), return_logits=True)
    backward([output])

    naive = NaiveModel(model, "qa", adapter, seed=SEED, expert=expert)
    expected = naive(run)
    (expected.loss + expected.aux_loss).backward()
    assert_close(output.logits, expected.logits, 1e-9, "logits")
    assert_close(output.loss, expected.loss, 1e-9, "loss")
    assert_close(output.aux_loss, expected.aux_loss, 1e-9, "aux loss")
    assert len(output.router_logits or ()) == len(expected.router_logits)
    for layer, logits in enumerate(output.router_logits or ()):
        assert_close(logits, expected.router_logits[layer], 1e-9, f"router logits of layer {layer}")
    return model, output, naive


def compare_gradients(model, naive):
    found, expected = gradients(model, "qa"), naive.gradients()
    assert found.keys() == expected.keys()
    for key, gradient in found.items():
        assert_close(gradient, expected[key], 1e-9, key)
        assert gradient.dtype == torch.float64
    largest = {key: gradient.abs().max() for key, gradient in expected.items()}
    assert max(largest.values()) > 1e-3  # something to compare


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["balance", "balance_per_layer", "cv2"])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_routing_and_router_losses(top_k, kind, training):
    adapter = MixLoraConfig(r=3, num_experts=5, top_k=top_k, lora_dropout=0.4, router_aux_loss_type=kind, **COEFS)
    model, output, naive = compare(adapter, training=training)
    compare_gradients(model, naive)
    assert output.aux_loss > 0


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("targets", SUBSETS)
def test_expert_subsets(targets, dropout):
    adapter = MixLoraConfig(r=2, num_experts=4, lora_dropout=dropout, target_modules=targets, **COEFS)
    model, _, naive = compare(adapter)
    compare_gradients(model, naive)
    assert not any("self_attn" in key for key in model.adapter_state("qa"))


@pytest.mark.parametrize("targets", [("q_proj", "gate_proj"), ("k_proj", "o_proj", "up_proj", "down_proj")])
def test_some_attention_targets(targets):
    adapter = MixLoraConfig(r=2, num_experts=3, lora_dropout=0.2, target_modules=targets)
    model, _, naive = compare(adapter)
    compare_gradients(model, naive)
    touched = {name for key in model.adapter_state("qa") for name in ATTENTION_PROJECTIONS if name in key}
    assert touched == set(targets) & set(ATTENTION_PROJECTIONS)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_rslora": True},
        {"lora_alpha": 1.5},
        {"router_jitter_noise": 0.3},
        {"num_experts": 1, "top_k": 1},
        {"num_experts": 1, "top_k": 1, "lora_dropout": 0.3},
        {"r": 1},
        {"router_aux_loss_coef": 0.0},
    ],
    ids=str,
)
def test_settings(changes):
    model, _, naive = compare(MixLoraConfig(**{"r": 3, "num_experts": 4, **changes}))
    compare_gradients(model, naive)


@pytest.mark.parametrize(
    "config",
    [
        {"mlp_bias": True, "attention_bias": True},
        {"tie_word_embeddings": True, "num_key_value_heads": 1},
        {"num_hidden_layers": 1, "head_dim": 10},
    ],
    ids=str,
)
def test_bases(config):
    """A bias on the down projection is added once a token, not once a choice times its weight."""
    model, _, naive = compare(MixLoraConfig(r=2, num_experts=3, top_k=2, lora_dropout=0.2), **config)
    compare_gradients(model, naive)


@pytest.mark.parametrize("lengths", [(5,), (1, 1, 4), (3, 1)])
def test_experts_without_a_token(lengths):
    """More experts than choices: those left out have a gradient of exactly zero, not none and not NaN."""
    adapter = MixLoraConfig(r=2, num_experts=16, top_k=2, lora_dropout=0.3, router_aux_loss_coef=0.0)
    model, output, naive = compare(adapter, lengths)
    compare_gradients(model, naive)
    for layer, logits in enumerate(output.router_logits):
        chosen = set(logits.topk(2, dim=1).indices.flatten().tolist())
        left_out = set(range(16)) - chosen
        assert left_out
        for key, gradient in model.adapter_gradients("qa").items():
            if any(f"layers.{layer}.mlp" in key and f".experts.{expert}." in key for expert in left_out):
                assert torch.equal(gradient, torch.zeros_like(gradient)), key


def test_one_token_has_outputs_but_no_loss():
    adapter = MixLoraConfig(r=2, num_experts=3, lora_dropout=0.3)
    model, output, naive = compare(adapter, (1,))
    assert output.loss == 0
    assert output.num_supervised_tokens == 0
    for key, gradient in gradients(model, "qa").items():
        assert_close(gradient, naive.gradients()[key], 1e-9, key)


def test_top_1_gives_the_router_a_gradient_from_the_task():
    """Renormalised to one, the weight of a single choice would be a constant."""
    adapter = MixLoraConfig(r=2, num_experts=4, top_k=1, router_aux_loss_coef=0.0)
    model, _, naive = compare(adapter)
    compare_gradients(model, naive)
    routers = [gradient for key, gradient in gradients(model, "qa").items() if "moe_gate" in key]
    assert all(gradient.abs().max() > 1e-4 for gradient in routers)


def test_uniform_routers_have_the_least_balance_loss():
    """DESIGN: the minimum of the balance loss is top_k, that of cv2 is 0."""
    for kind, least in (("balance", 3.0), ("balance_per_layer", 3.0), ("cv2", 0.0)):
        adapter = MixLoraConfig(r=2, num_experts=5, top_k=3, router_aux_loss_type=kind, router_aux_loss_coef=1.0)
        model = make_model(adapter, training=False)
        for key, weight in model.adapter_state("qa").items():
            if "moe_gate" in key:
                weight.zero_()
        (output,) = model(fuse(random_run("qa", (6,))))
        assert_close(output.aux_loss, torch.tensor(least), 1e-12, kind)


@pytest.mark.parametrize("expert", [0, 2])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_one_expert_alone(expert, dropout):
    """``moe.qa.experts.2``: that expert with weight 1, no router, the task's attention LoRA kept."""
    adapter = MixLoraConfig(r=2, num_experts=3, lora_dropout=dropout, **COEFS)
    model, output, naive = compare(adapter, expert=expert)
    assert output.adapter_name == f"moe.qa.experts.{expert}"
    assert output.aux_loss == 0
    assert output.router_logits is None
    expected = naive.gradients()
    for key, gradient in model.adapter_gradients("qa").items():
        if "moe_gate" in key:
            assert gradient is None
        else:
            assert_close(gradient, expected[key], 1e-9, key)
            if "self_attn" in key or f".experts.{expert}." in key:
                assert gradient.abs().max() > 0, key
            else:
                assert torch.equal(gradient, torch.zeros_like(gradient)), key


@pytest.mark.parametrize("targets", SUBSETS)
def test_one_expert_alone_with_fewer_targets(targets):
    compare(MixLoraConfig(r=2, num_experts=3, lora_dropout=0.3, target_modules=("v_proj", *targets)), expert=1)
