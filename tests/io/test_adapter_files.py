"""Adapter folders: exchanged with the real PEFT, and saved so that nothing is ever half of one."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from builders import add_random_adapter, assert_close, random_run, randomize, run_step, tiny_config, tiny_model
from hf_twin import hf_model, twin_of
from safetensors.torch import load_file

from moe_peft import LlamaForCausalLM, LoraConfig, MixLoraConfig, load_adapter, save_adapter
from moe_peft.io.adapter_files import CONFIG_FILE, WEIGHTS_FILE, read_adapter_config

TWIN_SETTINGS = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 38,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
CONFIGS = {
    "all": LoraConfig(r=4, lora_alpha=12),
    "rslora": LoraConfig(r=5, lora_alpha=3, use_rslora=True, target_modules=("q_proj", "down_proj")),
    "one target": LoraConfig(r=1, lora_alpha=7.5, lora_dropout=0.3, target_modules=("gate_proj",)),
    "attention": LoraConfig(r=8, target_modules=("k_proj", "o_proj", "v_proj"), init_lora_weights="gaussian"),
}
MIXTURES = {
    "all": MixLoraConfig(r=3, num_experts=4, top_k=2, lora_dropout=0.1, router_jitter_noise=0.2),
    "down only": MixLoraConfig(r=2, num_experts=3, top_k=1, target_modules=("down_proj",), router_z_loss_coef=1e-3),
    "rslora": MixLoraConfig(
        r=2, num_experts=5, top_k=5, use_rslora=True, target_modules=("q_proj", "up_proj"), router_aux_loss_type="cv2"
    ),
}


@pytest.fixture
def model() -> LlamaForCausalLM:
    return tiny_model()


def logits_of(model: LlamaForCausalLM, name: str) -> torch.Tensor:
    return run_step(model, random_run(name, [7, 1, 12], seed=5))[0][0].logits


def peft_logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        samples = [torch.tensor([ids]) for ids in random_run("", [7, 1, 12], seed=5).samples]
        return torch.cat([model(input_ids=ids).logits[0] for ids in samples])


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_peft_computes_the_same_from_what_we_save(config: LoraConfig, tmp_path: Path) -> None:
    hf = hf_model("llama", TWIN_SETTINGS)
    ours = twin_of(hf, tiny_config())
    add_random_adapter(ours, "qa", config)
    save_adapter(ours, "qa", tmp_path / "qa")
    theirs = peft.PeftModel.from_pretrained(hf, str(tmp_path / "qa")).eval()
    expected = peft_logits(theirs)
    assert (expected - logits_of(ours, "")).abs().max() > 1e-2, "the adapter must change something"
    assert_close(logits_of(ours, "qa"), expected, 1e-4)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_we_compute_the_same_from_what_peft_saves(config: LoraConfig, tmp_path: Path) -> None:
    hf = hf_model("llama", TWIN_SETTINGS)
    ours = twin_of(hf, tiny_config())
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        target_modules=config.target_modules if config.target_modules == "all-linear" else list(config.target_modules),
    )
    theirs = peft.get_peft_model(hf, settings).eval()
    randomize({name: weight for name, weight in theirs.named_parameters() if "lora_" in name}, seed=3, std=0.2)
    theirs.save_pretrained(str(tmp_path / "qa"))
    assert load_adapter(ours, tmp_path / "qa") == "qa"
    expected = peft_logits(theirs)
    assert (expected - logits_of(ours, "")).abs().max() > 1e-2
    assert_close(logits_of(ours, "qa"), expected, 1e-4)
    loaded = ours.adapter_config("qa")
    assert (loaded.scaling, loaded.targets) == (config.scaling, config.targets)


def test_dotted_target_names_of_peft_are_understood(tmp_path: Path) -> None:
    hf = hf_model("llama", TWIN_SETTINGS)
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["self_attn.q_proj", "mlp.up_proj"])
    peft.get_peft_model(hf, settings).save_pretrained(str(tmp_path / "qa"))
    ours = tiny_model()
    load_adapter(ours, tmp_path / "qa", "other")
    assert ours.adapter_config("other").targets == ("q_proj", "up_proj")


@pytest.mark.parametrize(
    "config", [*CONFIGS.values(), *MIXTURES.values()], ids=[*CONFIGS, *(f"mix {k}" for k in MIXTURES)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_save_and_load_gives_the_same_bits(config: LoraConfig, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model(dtype=dtype)
    add_random_adapter(model, "qa", config)
    save_adapter(model, "qa", tmp_path / "folder")
    other = tiny_model(dtype=dtype)
    load_adapter(other, tmp_path / "folder", "copy")
    run = random_run("qa", [7, 1, 12], seed=5)
    (first,), (second,) = run_step(model, run)[0], run_step(other, random_run("copy", [7, 1, 12], seed=5))[0]
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(first.loss, second.loss)
    assert torch.equal(first.aux_loss, second.aux_loss)
    saved, loaded = model.adapter_state("qa"), other.adapter_state("copy")
    assert saved.keys() == loaded.keys()
    for key, weight in saved.items():
        assert torch.equal(weight, loaded[key]), key
        assert loaded[key].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("config", [*CONFIGS.values(), *MIXTURES.values()], ids=repr)
def test_every_setting_comes_back(config: LoraConfig, model: LlamaForCausalLM, tmp_path: Path) -> None:
    model.add_adapter("qa", config)
    save_adapter(model, "qa", tmp_path / "qa")
    loaded = read_adapter_config(tmp_path / "qa")
    assert type(loaded) is type(config)
    for name in type(config).__dataclass_fields__:
        # The init has done its work, and "all-linear" is spelled out, as PEFT does it.
        expected = {"init_lora_weights": True, "target_modules": config.targets}.get(name, getattr(config, name))
        assert getattr(loaded, name) == expected, name


def test_names_of_the_weights_are_those_of_the_formats(model: LlamaForCausalLM, tmp_path: Path) -> None:
    model.add_adapter("lora", LoraConfig(r=2, target_modules=("q_proj", "down_proj")))
    model.add_adapter("mix", MixLoraConfig(r=2, num_experts=3, target_modules=("q_proj", "gate_proj")))
    for name in ("lora", "mix"):
        save_adapter(model, name, tmp_path / name)
    shapes = {key: tuple(tensor.shape) for key, tensor in load_file(tmp_path / "lora" / WEIGHTS_FILE).items()}
    prefix = "base_model.model.model.layers"
    assert shapes == {
        f"{prefix}.{layer}.{module}.lora_{factor}.weight": shape
        for layer in range(2)
        for module, factor, shape in [
            ("self_attn.q_proj", "A", (2, 24)),
            ("self_attn.q_proj", "B", (24, 2)),
            ("mlp.down_proj", "A", (2, 38)),
            ("mlp.down_proj", "B", (24, 2)),
        ]
    }
    shapes = {key: tuple(tensor.shape) for key, tensor in load_file(tmp_path / "mix" / WEIGHTS_FILE).items()}
    assert shapes == {
        f"mixlora.layers.{layer}.{name}.weight": shape
        for layer in range(2)
        for name, shape in [
            ("mlp.moe_gate", (3, 24)),
            ("self_attn.q_proj.lora_A", (2, 24)),
            ("self_attn.q_proj.lora_B", (24, 2)),
            *((f"mlp.gate_proj.experts.{expert}.lora_A", (2, 24)) for expert in range(3)),
            *((f"mlp.gate_proj.experts.{expert}.lora_B", (38, 2)) for expert in range(3)),
        ]
    }
    assert json.loads((tmp_path / "mix" / CONFIG_FILE).read_text())["peft_type"] == "MIXLORA"


def test_saving_replaces_an_older_adapter(model: LlamaForCausalLM, tmp_path: Path) -> None:
    add_random_adapter(model, "old", LoraConfig(r=2), seed=1)
    add_random_adapter(model, "new", MixLoraConfig(r=2, num_experts=2), seed=2)
    save_adapter(model, "old", tmp_path / "a" / "b")
    save_adapter(model, "new", tmp_path / "a" / "b")
    load_adapter(model, tmp_path / "a" / "b", "again")
    assert torch.equal(logits_of(model, "again"), logits_of(model, "new"))
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_a_folder_with_other_files_is_not_replaced(model: LlamaForCausalLM, tmp_path: Path) -> None:
    model.add_adapter("qa", LoraConfig(r=2))
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"mine holds 'thesis\.txt'"):
        save_adapter(model, "qa", folder)
    with pytest.raises(ValueError, match=r"thesis\.txt is a file"):
        save_adapter(model, "qa", folder / "thesis.txt")
    with pytest.raises(ValueError, match="adapter 'qq' is not attached to this model; valid here: qa"):
        save_adapter(model, "qq", tmp_path / "new")
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "thesis.txt"]
    assert (folder / "thesis.txt").read_text() == "years of work"


def failing_at(call: int, real: Callable) -> Callable:
    """A stand-in for a function of ``os`` whose n-th call, from 0, fails."""
    calls = iter(range(1000))

    def stand_in(*args, **kwargs):
        if next(calls) == call:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    return stand_in


@pytest.mark.parametrize("function", ["rename", "replace", "fsync", "chmod"])
def test_a_save_that_is_stopped_leaves_the_old_adapter(
    function: str, model: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_random_adapter(model, "old", LoraConfig(r=2), seed=1)
    add_random_adapter(model, "new", LoraConfig(r=3), seed=2)
    folder = tmp_path / "qa"
    save_adapter(model, "old", folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    num_stopped = 0
    for call in range(20):
        with monkeypatch.context() as patch:
            if function == "rename":  # as on a system that cannot swap two folders in one step
                patch.setattr("moe_peft.io.atomic._exchange", lambda *_: False)
            patch.setattr(os, function, failing_at(call, getattr(os, function)))
            try:
                save_adapter(model, "new", folder)
                break
            except KeyboardInterrupt:
                num_stopped += 1
        if (folder / WEIGHTS_FILE).stat().st_size != len(before[WEIGHTS_FILE]):
            break  # stopped after the new one was in place
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        assert [path.name for path in tmp_path.iterdir()] == ["qa"], "nothing may be left beside it"
    assert num_stopped >= 1
    load_adapter(model, folder, "loaded")
    assert torch.equal(logits_of(model, "loaded"), logits_of(model, "new"))
