"""Experts whose rank, scale, dropout or init is not the attention's, against a per-token loop in float64."""

import dataclasses

import pytest
import torch
from builders import (
    add_random_adapter,
    assert_close,
    backward,
    clear_gradients,
    fuse,
    gradients,
    random_run,
    run_step,
    tiny_model,
)
from naive_model import NaiveModel

from moe_peft import LoraConfig, MixLoraConfig, load_adapter, save_adapter
from moe_peft.adapters.expert_lora import ExpertLoraConfig
from moe_peft.io.adapter_files import read_adapter_config

SEED = 7
OWN = {"r": 2, "lora_alpha": 10.0, "lora_dropout": 0.5, "use_rslora": True}
ADAPTER = MixLoraConfig(
    r=3, lora_alpha=7, lora_dropout=0.2, num_experts=4, top_k=2, expert_lora=ExpertLoraConfig(**OWN)
)


class NaiveExperts(NaiveModel):
    """Scales the experts by 10 / sqrt(2), and drops half of what they see."""

    def update(self, layer, name, x, expert=None):
        ours = super().update(layer, name, x, expert)
        return ours if expert is None else ours * (10 / 2**0.5) / (7 / 3)

    def dropped(self, layer, input_name, features):
        own, rate = self.adapter, 0.5 if input_name.startswith("mlp") else 0.2
        self.adapter = dataclasses.replace(own, expert_lora=None, lora_dropout=rate)
        try:
            return super().dropped(layer, input_name, features)
        finally:
            self.adapter = own


@pytest.mark.parametrize("training", [True, False])
def test_logits_and_every_gradient(training: bool) -> None:
    model = tiny_model(dtype=torch.float64)
    add_random_adapter(model, "qa", ADAPTER, seed=SEED)
    model.train(training)
    run = random_run("qa", (4, 1, 6), seed=3, step=5, micro_batch=2)
    (output,) = model(fuse(run), return_logits=True)
    backward([output])
    naive = NaiveExperts(model, "qa", ADAPTER, seed=SEED)
    expected = naive(run)
    (expected.loss + expected.aux_loss).backward()
    assert_close(output.logits, expected.logits, 1e-9, "logits")
    found = gradients(model, "qa")
    assert found.keys() == naive.gradients().keys()
    for key, gradient in naive.gradients().items():
        assert_close(found[key], gradient, 1e-9, key)


def test_neighbours_with_other_experts_change_nothing() -> None:
    model = tiny_model(dtype=torch.float64)
    add_random_adapter(model, "qa", ADAPTER, seed=SEED)
    add_random_adapter(model, "plain", dataclasses.replace(ADAPTER, expert_lora=None), seed=SEED + 1)
    model.train()
    runs = [random_run("qa", (4, 2), seed=3), random_run("plain", (5,), seed=4)]
    (alone, _), alone_gradients = run_step(model, runs[0], random_run("", (3,), seed=9))
    (fused, _), fused_gradients = run_step(model, *runs)
    assert_close(fused.logits, alone.logits, 1e-12)
    for key, gradient in alone_gradients["qa"].items():
        assert_close(fused_gradients["qa"][key], gradient, 1e-12, key)
    clear_gradients(model)


def test_what_is_not_said_is_the_adapter_s() -> None:
    adapter = MixLoraConfig(r=3, lora_alpha=7, lora_dropout=0.2, use_rslora=True, expert_lora={"r": 5})
    own = adapter.expert_factors
    assert type(own) is LoraConfig
    assert (own.r, own.lora_alpha, own.lora_dropout, own.use_rslora) == (5, 7, 0.2, True)
    for same in (None, {}, {"r": 3}):
        assert dataclasses.replace(adapter, expert_lora=same).expert_factors.r == 3


def test_the_init_of_the_experts_is_their_own() -> None:
    model = tiny_model()
    model.add_adapter("qa", MixLoraConfig(r=2, num_experts=2, expert_lora={"init_lora_weights": False}))
    for key, weight in model.adapter_state("qa").items():
        if "lora_B" in key:
            assert bool(weight.any()) == (".experts." in key), key


def test_it_is_saved_and_comes_back(tmp_path) -> None:
    model = tiny_model()
    add_random_adapter(model, "qa", ADAPTER, seed=SEED)
    save_adapter(model, "qa", tmp_path / "qa")
    loaded = read_adapter_config(tmp_path / "qa")
    assert isinstance(loaded, MixLoraConfig)
    assert (loaded.expert_lora, loaded.expert_factors.scaling) == (ExpertLoraConfig(**OWN), 10 / 2**0.5)
    load_adapter(model, tmp_path / "qa", "copy")
    ours, copy = (run_step(model, random_run(name, (4, 2), seed=3))[0][0] for name in ("qa", "copy"))
    assert torch.equal(ours.logits, copy.logits)


@pytest.mark.parametrize(
    ("expert_lora", "message"),
    [
        ({"r": 0}, "expert_lora.r=0 must be at least 1"),
        ({"lora_dropout": 1.0}, r"expert_lora.lora_dropout=1.0 must be in \[0, 1\)"),
        ({"r": "4"}, r"expert_lora.r='4' must be int \| null, not str"),
        ({"rank": 4}, "expert_lora.rank=4 is not a known key"),
        (8, "expert_lora=8 must be a mapping of keys to values, not int"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused_by_name(expert_lora: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixLoraConfig(expert_lora=expert_lora)
