"""A LoRA whose ranks grow: what grows, that nothing changes by it, and a folder that the real peft reads."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from builders import Run, add_random_adapter, assert_close, assert_relative, random_samples, run_step, tiny_model
from hf_twin import hf_model, twin_of
from torch import Tensor

from moe_peft import AdaptiveLoraConfig, LlamaConfig, LlamaForCausalLM, LoraConfig, load_adapter, save_adapter
from moe_peft.adapters.lora import PROJECTIONS
from moe_peft.io.adapter_files import read_adapter_config

SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 38,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
}
RUN = Run("qa", random_samples((9, 4, 1, 6)))


def model_with(**settings: Any) -> LlamaForCausalLM:
    """Four layers with a random adapter ``qa``."""
    model = tiny_model(LlamaConfig(**SIZES))
    add_random_adapter(model, "qa", AdaptiveLoraConfig(**settings), seed=4)
    return model


def set_gradients(model: LlamaForCausalLM, norms: Sequence[float]) -> None:
    """Gradients whose norms over a layer are these, spread over all weights of the layer."""
    state = dict(zip(model.adapter_state("qa"), model.adapter_parameters("qa"), strict=True))
    for layer, norm in enumerate(norms):
        own = [weight for key, weight in state.items() if f"layers.{layer}." in key]
        count = sum(weight.numel() for weight in own)
        for weight in own:
            weight.grad = torch.full_like(weight, norm / count**0.5)


def train(model: LlamaForCausalLM, norms: Sequence[Sequence[float]], num_steps: int = 100) -> None:
    """Have gradients of these norms come by, a step each."""
    updates = model.adapter_config("qa").updates(model, "qa", num_steps)
    for step, of_layers in enumerate(norms, start=1):
        set_gradients(model, of_layers)
        updates.after_step(step)


def ranks_of(model: LlamaForCausalLM) -> list[set[int]]:
    """The ranks that occur in each layer."""
    state = model.adapter_state("qa")
    return [
        {weight.shape[0] for key, weight in state.items() if f"layers.{layer}." in key and "lora_A" in key}
        for layer in range(SIZES["num_hidden_layers"])
    ]


def product(lora_a: Tensor, lora_b: Tensor) -> Tensor:
    """``B A`` added up rank by rank, so that what is added last cannot change how the rest is rounded."""
    total = torch.zeros(lora_b.shape[0], lora_a.shape[1], dtype=lora_a.dtype)
    for row, column in zip(lora_a, lora_b.T, strict=True):
        total = total + column[:, None] * row
    return total


def products(model: LlamaForCausalLM) -> dict[str, Tensor]:
    """``B A`` of every projection."""
    state = model.adapter_state("qa")
    return {
        key: product(weight, state[key.replace("lora_A", "lora_B")]) for key, weight in state.items() if "lora_A" in key
    }


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"init_lora_weights": False, "lora_alpha": 3}], ids=str)
def test_growth_changes_no_product_no_scale_and_no_logit(settings: dict[str, Any]) -> None:
    model = model_with(r=3, max_rank=12, grow_every=1, grow_share=0.5, **settings)
    before, old = products(model), {key: weight.clone() for key, weight in model.adapter_state("qa").items()}
    (expected,), _ = run_step(model, RUN)
    scales = {key: module.scaling_ for key, module in model.named_modules() if hasattr(module, "scaling_")}
    train(model, [[1.0, 4.0, 2.0, 3.0]])
    assert ranks_of(model) == [{3}, {6}, {3}, {6}]
    for key, now in products(model).items():
        assert torch.equal(now, before[key]), key
    for key, weight in model.adapter_state("qa").items():
        if weight.shape != old[key].shape:
            rank_dim = 0 if "lora_A" in key else 1
            kept, new = weight.split(3, dim=rank_dim)
            assert torch.equal(kept, old[key]), key
            assert new.any() == ("lora_A" in key), key
            assert not torch.equal(new, old[key])
            if "lora_A" in key:
                assert 0.5 < new.abs().max() * new.shape[1] ** 0.5 <= 1  # within LoRA's bound for A
    assert scales == {key: module.scaling_ for key, module in model.named_modules() if hasattr(module, "scaling_")}
    (output,), found = run_step(model, RUN)
    assert_relative(output.logits, expected.logits, 1e-5, "logits")
    for key, gradient in found["qa"].items():
        assert gradient.shape == model.adapter_state("qa")[key].shape
        if "lora_B" in key and gradient.shape[1] == 6:
            assert gradient[:, 3:].abs().max() > 0, key  # what is new can learn


def test_new_rows_are_of_the_adapters_own_draws() -> None:
    """The same again for the same seed, others for another projection or layer and at the next growth."""
    first, second = (model_with(r=2, max_rank=8, grow_every=1, grow_share=1.0) for _ in range(2))
    torch.manual_seed(5)
    for model in (first, second):
        train(model, [[1.0] * 4] * 2)
        torch.manual_seed(6)
    ours, theirs = first.adapter_state("qa"), second.adapter_state("qa")
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    rows = [row for key in ours if "lora_A" in key and "down" not in key for row in ours[key].split(2)]
    assert len(rows) == 4 * 6 * 4
    for i, row in enumerate(rows):
        assert not any(torch.equal(row, other) for other in rows[:i])


def test_the_top_layers_with_room_grow_by_added_up_norms() -> None:
    """Norms add up between two growths, and begin anew; of equals the lower layer comes first, a full one never."""
    model = model_with(r=2, max_rank=8, grow_every=2, grow_share=0.25)
    norms = [[5, 0, 0, 1], [0, 0, 4, 2], [9, 0, 0, 9], [1, 1, 1, 1], [9, 1, 1, 1], [1, 0, 0, 0], [7, 0, 0, 1], [9] * 4]
    train(model, norms)
    assert ranks_of(model) == [{8}, {4}, {2}, {4}]
    save = model.adapter_config("qa").to_peft(model, "qa")["growth_history"]
    assert [growth["step"] for growth in save] == [2, 4, 6, 8]
    assert [growth["ranks"] for growth in save] == [(4, 2, 2, 2), (8, 2, 2, 2), (8, 4, 2, 2), (8, 4, 2, 4)]
    expected = [[5, 0, 4, 3], [10, 1, 1, 10], [10, 1, 1, 1], [16, 9, 9, 10]]
    for growth, importance in zip(save, expected, strict=True):
        assert growth["importance"] == pytest.approx(importance, rel=1e-5, abs=1e-6)


def test_as_many_layers_grow_as_the_share_says_until_none_has_room() -> None:
    model = model_with(r=2, max_rank=4, grow_every=1, grow_share=0.75, rank_pattern={"layers.0.self_attn.q_proj": 4})
    updates = model.adapter_config("qa").updates(model, "qa", 9)
    seen = []
    for step in range(1, 4):
        set_gradients(model, [4.0, 3.0, 2.0, 1.0])
        updates.after_step(step)
        seen.append(ranks_of(model))
    assert seen == [[{4}, {4}, {4}, {2}], [{4}] * 4, [{4}] * 4]


def test_nothing_grows_behind_the_last_step_and_a_skipped_one_is_made_up_for() -> None:
    model = model_with(r=2, max_rank=8, grow_every=2, grow_share=0.25)
    updates = model.adapter_config("qa").updates(model, "qa", 6)
    for step in (1, 3, 5, 6):  # steps 2 and 4 were skipped
        set_gradients(model, [1.0, 2.0, 3.0, 4.0])
        updates.after_step(step)
    history = model.adapter_config("qa").to_peft(model, "qa")["growth_history"]
    assert [growth["step"] for growth in history] == [3, 5]
    assert ranks_of(model) == [{2}, {2}, {2}, {8}]


def grown(**settings: Any) -> LlamaForCausalLM:
    """A model whose adapter has grown twice, with random weights again."""
    hf = hf_model("llama", SIZES)
    model = twin_of(hf, LlamaConfig(**SIZES))
    add_random_adapter(model, "qa", AdaptiveLoraConfig(grow_every=1, **settings), seed=4)
    train(model, [[1.0, 4.0, 2.0, 3.0], [1.0, 4.0, 5.0, 3.0]])
    generator = torch.Generator().manual_seed(8)
    for weight in model.adapter_state("qa").values():
        weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    return model


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments .*'grow_every'")
@pytest.mark.parametrize(
    "settings",
    [
        {"r": 3, "grow_share": 0.5, "lora_alpha": 5},
        {"r": 2, "use_rslora": True, "max_rank": 8, "target_modules": ["v_proj", "gate_proj"]},
        {"r": 4, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"up_proj": 7}},
    ],
    ids=str,
)
def test_peft_reads_the_folder_and_so_do_we(settings: dict[str, Any], tmp_path: Path) -> None:
    model = grown(**settings)
    (expected,), _ = run_step(model, RUN)
    save_adapter(model, "qa", tmp_path / "qa")
    theirs = peft.PeftModel.from_pretrained(hf_model("llama", SIZES), str(tmp_path / "qa")).eval()
    with torch.no_grad():
        logits = torch.cat([theirs(torch.tensor([sample])).logits[0] for sample in RUN.samples])
    assert_close(expected.logits, logits, 1e-4, "logits")

    fresh = twin_of(hf_model("llama", SIZES), LlamaConfig(**SIZES))
    load_adapter(fresh, tmp_path / "qa")
    (loaded,), _ = run_step(fresh, RUN)
    assert torch.equal(loaded.logits, expected.logits)
    assert isinstance(fresh.adapter_config("qa"), AdaptiveLoraConfig)
    assert len(fresh.adapter_config("qa").growth_history) == 2
    save_adapter(fresh, "qa", tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "qa" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_what_is_loaded_grows_on() -> None:
    """Its history goes on, and ranks that have come to the largest stay."""
    model = grown(r=2, max_rank=4, grow_share=0.25)
    settings = model.adapter_config("qa").to_peft(model, "qa")
    again = tiny_model(LlamaConfig(**SIZES))
    known = AdaptiveLoraConfig.__dataclass_fields__
    again.add_adapter("qa", AdaptiveLoraConfig(**{key: settings[key] for key in settings if key in known}))
    assert ranks_of(again) == ranks_of(model) == [{2}, {4}, {4}, {2}]
    updates = again.adapter_config("qa").updates(again, "qa", 9)
    set_gradients(again, [3.0, 4.0, 0.0, 1.0])
    updates.after_step(1)  # of a training of its own
    assert ranks_of(again) == [{4}, {4}, {4}, {2}]
    assert [growth["step"] for growth in again.adapter_config("qa").to_peft(again, "qa")["growth_history"]] == [1, 2, 1]


def test_folders_of_plain_lora_stay_plain(tmp_path: Path) -> None:
    model = tiny_model()
    add_random_adapter(model, "plain", LoraConfig(r=2))
    add_random_adapter(model, "growing", AdaptiveLoraConfig(r=2))
    for name in ("plain", "growing"):
        save_adapter(model, name, tmp_path / name)
        assert json.loads((tmp_path / name / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert type(read_adapter_config(tmp_path / "plain")) is LoraConfig
    assert type(read_adapter_config(tmp_path / "growing")) is AdaptiveLoraConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_rank": 4}, "max_rank=4 must be r=8 times a power of two"),
        ({"max_rank": 24}, "max_rank=24 must be r=8 times a power of two"),
        ({"max_rank": 0}, "max_rank=0 must be at least 1"),
        ({"grow_every": 0}, "grow_every=0 must be at least 1"),
        ({"grow_share": 0.0}, r"grow_share=0.0 must be in \(0, 1\]"),
        ({"grow_share": 1.1}, r"grow_share=1.1 must be in \(0, 1\]"),
        ({"rank_pattern": {"q_proj": 33}}, r"rank_pattern\['q_proj'\]=33 must be at most max_rank=32"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' must be true, false or 'gaussian'"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaptiveLoraConfig(**settings)


def test_a_history_of_another_model_is_refused() -> None:
    history = [{"step": 1, "importance": [1.0], "ranks": [8]}]
    with pytest.raises(ValueError, match="growth_history has 1 layers, but the adapter is on 2"):
        tiny_model().add_adapter("qa", AdaptiveLoraConfig(growth_history=history))


def test_every_projection_may_be_a_target() -> None:
    """The layer's growth is noted on the first of them, whichever that is."""
    for target in PROJECTIONS:
        model = tiny_model()
        model.add_adapter("qa", AdaptiveLoraConfig(target_modules=[target], layers_to_transform=[1]))
        assert {key.split(".")[1] for key in model.adapter_buffers("qa")} == {"1"}


def test_the_largest_that_it_can_become():
    """Nothing grows behind the last step, and no rank above ``max_rank``, whatever it begins with."""
    config = AdaptiveLoraConfig(r=4, max_rank=32, grow_every=10, rank_pattern={"q_proj": 5, "k_proj": 32})
    ranks = {steps: config.at_largest(steps) for steps in (1, 10, 11, 21, 1000)}
    assert {steps: (at.r, *at.rank_pattern.values()) for steps, at in ranks.items()} == {
        1: (4, 5, 32),
        10: (4, 5, 32),
        11: (8, 10, 32),
        21: (16, 20, 32),
        1000: (32, 20, 32),
    }
    assert config.at_largest(1000).at_largest(1000) == config.at_largest(1000)
    assert LoraConfig().at_largest(1000) == LoraConfig()
