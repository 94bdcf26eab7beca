"""LoRA+: the factors lora_B learn at a multiple of the rate, as the real PEFT's optimizer has it."""

from pathlib import Path
from typing import Any

import peft
import pytest
import tiny_run
import torch
from builders import tiny_model
from every_method import CONFIGS, METHOD_OF
from hf_twin import hf_model
from peft.optimizers import create_loraplus_optimizer
from tiny_run import adapter_entry, make_base_folder, run_config

from moe_peft import AdaLoraConfig, DoraConfig, LoraConfig, MixLoraConfig, PromptEncoderConfig
from moe_peft.adapters import Method
from moe_peft.config import AdapterJob
from moe_peft.config.job import method_of
from moe_peft.training.optimizer import build_optimizer, set_learning_rate

RATE, RATIO = 3e-3, 16.0
SETTINGS = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 38, "num_hidden_layers": 2}
SETTINGS |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


def job(adapter: Method, **changes) -> AdapterJob:
    fields = {"name": "qa", "method": method_of(adapter), "adapter": adapter, "data": "x.jsonl", "lr": RATE, **changes}
    return AdapterJob(**fields)


def rates(optimizer: torch.optim.Optimizer, names: dict[int, Any]) -> dict[Any, float]:
    """The learning rate of every weight."""
    return {names[id(weight)]: group["lr"] for group in optimizer.param_groups for weight in group["params"]}


def takes_ratio(key: str, weight: torch.Tensor) -> bool:
    """PEFT's rule."""
    return "lora_B" in key or weight.ndim == 1


@pytest.mark.parametrize("name", CONFIGS)
def test_every_method_has_what_learns_faster_or_refuses_to(name: str) -> None:
    """By name, before anything trains; a table of virtual tokens has nothing that could."""
    model, config = tiny_model(), CONFIGS[name]
    model.add_adapter("qa", config)
    weights = {key: weight for key, weight, _ in model.named_adapter_weights("qa")}
    expected = {key: RATE * RATIO if takes_ratio(key, weight) else RATE for key, weight in weights.items()}
    if set(expected.values()) == {RATE}:
        assert METHOD_OF[name] in {"prompt_tuning", "prefix_tuning"}
        with pytest.raises(ValueError, match=rf"loraplus_lr_ratio=16\.0 .*method='{METHOD_OF[name]}' .* has none"):
            job(config, loraplus_lr_ratio=RATIO)
        return
    optimizer = build_optimizer(model, job(config, loraplus_lr_ratio=RATIO))
    # A mixture's experts are one stack under many names.
    found = rates(optimizer, {id(weight): id(weight) for weight in weights.values()})
    assert {key: found[id(weight)] for key, weight in weights.items()} == pytest.approx(expected)


def test_virtual_tokens_out_of_a_folder_have_nothing_that_learns_faster() -> None:
    """Their encoder, whose biases would, is not in it."""
    config = PromptEncoderConfig(inference_mode=True)
    with pytest.raises(ValueError, match=r"loraplus_lr_ratio=2\.0 .*method='p_tuning' with these settings has none"):
        job(config, loraplus_lr_ratio=2)


def test_adalora_learns_at_the_rates_that_peft_gives_it() -> None:
    config = peft.AdaLoraConfig(task_type="CAUSAL_LM", total_step=9, target_modules=["q_proj", "down_proj"])
    theirs = peft.get_peft_model(hf_model("llama", SETTINGS), config)
    optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=RATIO)
    found = rates(optimizer, {id(weight): name.replace(".default", "") for name, weight in theirs.named_parameters()})
    model = tiny_model()
    model.add_adapter("qa", AdaLoraConfig(target_modules=["q_proj", "down_proj"]))
    ours = build_optimizer(model, job(model.adapter_config("qa"), loraplus_lr_ratio=RATIO))
    names = {id(weight): key for key, weight, _ in model.named_adapter_weights("qa")}
    assert rates(ours, names) == pytest.approx({name: rate for name, rate in found.items() if "lora_" in name})
    assert {rate for name, rate in rates(ours, names).items() if "lora_B" in name} == {RATE * RATIO}


@pytest.mark.parametrize("init", [True, "pissa"])
@pytest.mark.parametrize("method", [LoraConfig, DoraConfig])
def test_each_weight_learns_at_the_rate_that_peft_gives_it(method: type[LoraConfig], init: bool | str) -> None:
    """The magnitudes of DoRA at that of lora_B; the factors that PiSSA starts from at none."""
    own = {"r": 2, "init_lora_weights": init}
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], use_dora=method is DoraConfig, **own
    )
    theirs = peft.get_peft_model(hf_model("llama", SETTINGS), config)
    optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=RATIO)
    names = {
        id(weight): name.replace(".default", "").replace("vector.weight", "vector")
        for name, weight in theirs.named_parameters()
    }
    expected = {name: rate for name, rate in rates(optimizer, names).items() if "lora_" in name}

    model = tiny_model()
    model.add_adapter("qa", method(target_modules=("q_proj", "down_proj"), **own))
    ours = build_optimizer(model, job(model.adapter_config("qa"), loraplus_lr_ratio=RATIO, weight_decay=0.1))
    found = rates(ours, {id(weight): key for key, weight, _ in model.named_adapter_weights("qa")})
    assert found == pytest.approx(expected)
    assert set(found.values()) == {RATE, RATE * RATIO}
    decays = {id(weight): group["weight_decay"] for group in ours.param_groups for weight in group["params"]}
    for key, weight, _ in model.named_adapter_weights("qa"):
        assert decays[id(weight)] == (0.0 if key.endswith("vector") else 0.1), key


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_schedule_moves_both_rates(optimizer: str) -> None:
    """Weights of a mixture after one step: the first of AdamW's is the rate itself, against the gradient's sign."""
    model = tiny_model()
    model.add_adapter("qa", MixLoraConfig(r=2, num_experts=3, target_modules=("q_proj", "up_proj")))
    ours = build_optimizer(model, job(model.adapter_config("qa"), loraplus_lr_ratio=RATIO, optimizer=optimizer))
    set_learning_rate(ours, RATE / 4)
    before = {key: weight.clone() for key, weight in model.adapter_state("qa").items()}
    for weight in model.adapter_parameters("qa"):
        weight.grad = torch.ones_like(weight)
    ours.step()
    for key, weight in model.adapter_state("qa").items():
        moved = RATE / 4 * (RATIO if "lora_B" in key else 1)
        torch.testing.assert_close(before[key] - weight, torch.full_like(weight, moved), rtol=1e-3, atol=1e-7)


def test_without_a_ratio_all_learn_at_one_rate() -> None:
    model = tiny_model()
    model.add_adapter("qa", MixLoraConfig(r=2, num_experts=3))
    groups = build_optimizer(model, job(model.adapter_config("qa"))).param_groups
    assert {group["lr"] for group in groups} == {RATE}


def test_a_ratio_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"loraplus_lr_ratio=0\.5 must be at least 1"):
        job(LoraConfig(), loraplus_lr_ratio=0.5)


def test_the_trainer_uses_it(tmp_path: Path) -> None:
    """Two adapters alike but for the ratio: after one step their A agree, and their B are a ratio apart."""
    base = make_base_folder(tmp_path / "base")
    data = tiny_run.write_jsonl(tmp_path / "data.jsonl", tiny_run.instructions(4))
    common = {"max_steps": 1, "optimizer": "sgd", "lr": 0.5, "max_grad_norm": None, "seed": 1}
    config = run_config(base, tmp_path / "run", adapter_entry("qa", data, loraplus_lr_ratio=8, **common))
    plain = run_config(base, tmp_path / "plain", adapter_entry("qa", data, **common))
    states = []
    for run in (config, plain):
        trainer = tiny_run.new_trainer(run)
        trainer.train()
        states.append(saved_weights(Path(run.output_dir or "")))
    fast, slow = states
    for key, weight in slow.items():
        torch.testing.assert_close(fast[key], weight * 8 if "lora_B" in key else weight, rtol=1e-5, atol=1e-8)
    assert any(weight.abs().max() > 1e-4 for key, weight in slow.items() if "lora_B" in key)


def saved_weights(run: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(run / "adapters" / "qa" / "adapter_model.safetensors")
