"""Learning rates against transformers' schedules, and what weight decay acts on."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from builders import tiny_model
from torch import nn

from moe_peft import LoraConfig, MixLoraConfig
from moe_peft.config import AdapterJob
from moe_peft.training.optimizer import build_optimizer, learning_rate

PEAK = 0.3


def job(adapter: LoraConfig | None = None, **changes) -> AdapterJob:
    adapter = adapter or LoraConfig()
    method = "mixlora" if isinstance(adapter, MixLoraConfig) else "lora"
    return AdapterJob(**{"name": "qa", "method": method, "adapter": adapter, "data": "x.jsonl", "lr": PEAK, **changes})


def transformers_rates(name: str, warmup: int, num_steps: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=PEAK)
    arguments = {"num_warmup_steps": warmup}
    if name == "constant_with_warmup":
        schedule = transformers.get_constant_schedule_with_warmup(optimizer, **arguments)
    else:
        make = getattr(transformers, f"get_{name}_schedule_with_warmup")
        schedule = make(optimizer, **arguments, num_training_steps=num_steps)
    rates = []
    for _ in range(num_steps + 1):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize(
    ("scheduler", "name"), [("constant", "constant_with_warmup"), ("linear", "linear"), ("cosine", "cosine")]
)
@pytest.mark.parametrize(("warmup", "num_steps"), [(0, 10), (1, 10), (4, 10), (9, 10), (10, 10), (0, 1), (25, 10)])
def test_schedules_have_the_shape_of_transformers(scheduler: str, name: str, warmup: int, num_steps: int) -> None:
    # transformers wastes its first warm-up step at rate 0. Ours is one step ahead until the peak; from there on they
    # are the same, so that both end alike.
    theirs = transformers_rates(name, warmup, num_steps)
    ours = [
        learning_rate(job(lr_scheduler=scheduler, warmup_steps=warmup), step, num_steps) for step in range(num_steps)
    ]
    for step, rate in enumerate(ours):
        assert rate == pytest.approx(theirs[step + 1 if step + 1 < warmup else step] if step + 1 != warmup else PEAK)
    assert ours[0] > 0, "no step is wasted"


@pytest.mark.parametrize(
    ("ratio", "num_steps", "warmup"),
    [(0.0, 10, 0), (0.1, 10, 1), (0.1, 11, 2), (0.25, 8, 2), (0.07, 100, 7), (0.29, 100, 29), (0.001, 10, 1)],
)
def test_warmup_ratio_is_a_share_of_all_steps_rounded_up(ratio: float, num_steps: int, warmup: int) -> None:
    for step in range(num_steps):
        by_ratio = learning_rate(job(warmup_ratio=ratio, lr_scheduler="linear"), step, num_steps)
        assert by_ratio == learning_rate(job(warmup_steps=warmup, lr_scheduler="linear"), step, num_steps)


def decayed_by_one_step(adapter: LoraConfig, **changes) -> dict[str, bool]:
    """Which weights a step with zero gradients shrinks by exactly ``lr * weight_decay``; the others must not change."""
    model = tiny_model()
    model.add_adapter("qa", adapter)
    for weight in model.adapter_parameters("qa"):
        weight.data.fill_(1.0)
        weight.grad = torch.zeros_like(weight)
    build_optimizer(model, job(adapter, weight_decay=0.1, **changes)).step()
    decayed = {}
    for key, weight in model.adapter_state("qa").items():
        decayed[key] = bool((weight != 1).any())
        torch.testing.assert_close(weight, torch.full_like(weight, 1 - PEAK * 0.1 if decayed[key] else 1.0))
    return decayed


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_weight_decay_spares_routers_unless_asked(optimizer: str) -> None:
    assert set(decayed_by_one_step(LoraConfig(r=2), optimizer=optimizer).values()) == {True}
    mixture = MixLoraConfig(r=2, num_experts=3)
    decayed = decayed_by_one_step(mixture, optimizer=optimizer)
    assert {key for key, is_decayed in decayed.items() if not is_decayed} == {
        f"mixlora.layers.{layer}.mlp.moe_gate.weight" for layer in range(2)
    }
    assert set(decayed_by_one_step(mixture, optimizer=optimizer, decay_router=True).values()) == {True}


def test_weight_decay_spares_one_dimensional_weights() -> None:
    weights = {"scale": nn.Parameter(torch.ones(3)), "matrix": nn.Parameter(torch.ones(2, 3))}
    model = SimpleNamespace(named_adapter_weights=lambda name: [(key, weight, None) for key, weight in weights.items()])
    groups = build_optimizer(model, job(weight_decay=0.1)).param_groups  # type: ignore[arg-type]
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(1, 0.1), (1, 0.0)]
    assert groups[1]["params"][0] is weights["scale"]


def test_each_parameter_is_optimized_once_and_none_of_the_base() -> None:
    model = tiny_model()
    adapter = MixLoraConfig(r=2, num_experts=3)
    model.add_adapter("qa", adapter)
    model.add_adapter("other", LoraConfig(r=2))
    groups = build_optimizer(model, job(adapter)).param_groups
    optimized = [id(weight) for group in groups for weight in group["params"]]
    assert sorted(optimized) == sorted(map(id, model.adapter_parameters("qa")))
    assert len(set(optimized)) == len(optimized)


def test_the_settings_reach_torch() -> None:
    model = tiny_model()
    model.add_adapter("qa", LoraConfig(r=2))
    adamw = build_optimizer(model, job(betas=(0.8, 0.95), eps=1e-5))
    assert isinstance(adamw, torch.optim.AdamW)
    assert (adamw.defaults["betas"], adamw.defaults["eps"], adamw.defaults["fused"]) == ((0.8, 0.95), 1e-5, True)
    sgd = build_optimizer(model, job(optimizer="sgd", momentum=0.9))
    assert isinstance(sgd, torch.optim.SGD)
    assert (sgd.defaults["momentum"], sgd.defaults["fused"]) == (0.9, True)
