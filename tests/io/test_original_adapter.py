"""Adapter folders of the original MoE-PEFT load, and compute what the original computes from them.

``fixtures/original`` was written by the original itself: ``tools/make_original_adapters.py`` says how.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from builders import assert_close, randomize, tiny_config
from hf_twin import hf_model, twin_of
from safetensors.torch import load_file, save_file

import moe_peft
from moe_peft import BatchConfig, LlamaForCausalLM, ModelInput, load_adapter, load_base_model, save_adapter
from moe_peft.io.adapter_files import read_adapter_config

FIXTURES = Path(__file__).parent / "fixtures" / "original"
ADAPTERS = ["lora", "rslora", "mixlora", "expert-lora"]
MIXTURES = ["mixlora", "expert-lora"]
TRUTH = load_file(FIXTURES / "logits.safetensors")
CONFIG, PICKLE, SAFE = "adapter_config.json", "adapter_model.bin", "adapter_model.safetensors"


@pytest.fixture
def model() -> LlamaForCausalLM:
    return load_base_model(FIXTURES / "base", dtype="float32", device="cpu").eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder with experts of their own, to be spoilt."""
    return Path(shutil.copytree(FIXTURES / "expert-lora", tmp_path / "qa"))


def logits_of(model: LlamaForCausalLM, name: str) -> torch.Tensor:
    lengths = TRUTH["lengths"]
    cu_seqlens = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    (output,) = model(ModelInput(TRUTH["samples"], cu_seqlens, (BatchConfig(name, 0, len(lengths)),)))
    return output.logits


def change_config(folder: Path, **changes: Any) -> None:
    """A change to ``...`` leaves the field out."""
    fields = {**json.loads((folder / CONFIG).read_text()), **changes}
    (folder / CONFIG).write_text(json.dumps({key: value for key, value in fields.items() if value is not ...}))


def refusal(model: LlamaForCausalLM, folder: Path) -> str:
    with pytest.raises(ValueError) as caught:
        load_adapter(model, folder)
    assert model.adapter_names == []
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ADAPTERS)
def test_logits_are_the_original_s(name: str, model: LlamaForCausalLM) -> None:
    assert load_adapter(model, FIXTURES / name) == name
    difference = (logits_of(model, "") - TRUTH[name]).abs().max()
    assert difference > 1, "the adapter must change something"
    torch.testing.assert_close(logits_of(model, name), TRUTH[name], rtol=0, atol=1e-4)


def test_all_of_them_in_one_batch(model: LlamaForCausalLM) -> None:
    for name in ADAPTERS:
        load_adapter(model, FIXTURES / name)
    lengths, count = TRUTH["lengths"].repeat(len(ADAPTERS)), len(TRUTH["lengths"])
    configs = tuple(BatchConfig(name, i * count, (i + 1) * count) for i, name in enumerate(ADAPTERS))
    cu_seqlens = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    outputs = model(ModelInput(TRUTH["samples"].repeat(len(ADAPTERS)), cu_seqlens, configs))
    for name, output in zip(ADAPTERS, outputs, strict=True):
        torch.testing.assert_close(output.logits, TRUTH[name], rtol=0, atol=1e-4)


def test_the_experts_own_settings_are_read() -> None:
    config = read_adapter_config(FIXTURES / "expert-lora")
    assert isinstance(config, moe_peft.MixLoraConfig)
    assert (config.r, config.lora_alpha, config.use_rslora) == (4, 6, False)
    own = config.expert_factors
    assert (own.r, own.lora_alpha, own.lora_dropout, own.use_rslora) == (2, 8, 2e-6, True)
    assert (config.num_experts, config.top_k) == (3, 2)
    assert config.router_aux_loss_coef == 0.001, "what it trains on with: the original's default, which it never saves"


@pytest.mark.parametrize("name", MIXTURES)
def test_saved_here_it_stays_the_same(name: str, model: LlamaForCausalLM, tmp_path: Path) -> None:
    load_adapter(model, FIXTURES / name, "qa")
    save_adapter(model, "qa", tmp_path / "ours")
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == [CONFIG, SAFE]
    assert "routing_strategy" not in json.loads((tmp_path / "ours" / CONFIG).read_text())
    load_adapter(model, tmp_path / "ours", "copy")
    copy, first = model.adapter_config("copy"), model.adapter_config("qa")
    assert copy == dataclasses.replace(first, target_modules=first.targets)
    assert torch.equal(logits_of(model, "copy"), logits_of(model, "qa"))


def test_its_weights_may_have_been_made_safe(model: LlamaForCausalLM, folder: Path) -> None:
    """And where both files are there, the safe one counts."""
    weights = torch.load(folder / PICKLE, weights_only=True)
    save_file({key: weight.detach().clone() for key, weight in weights.items()}, folder / SAFE)
    (folder / PICKLE).write_bytes(b"not a pickle")
    load_adapter(model, folder)
    torch.testing.assert_close(logits_of(model, "qa"), TRUTH["expert-lora"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"routing_strategy": "mixlora-dynamic", "top_p": 0.8}, "routing_strategy='mixlora-dynamic' must be 'mixlora'"),
        (
            {"routing_strategy": "mixlora-switch"},
            "routing_strategy='mixlora-switch' must be 'mixlora': the original has",
        ),
        ({"peft_type": "MOLA", "routing_strategy": "mola"}, "peft_type='MOLA' must be one of LORA, MIXLORA"),
        ({"top_k": 1}, "top_k=1: the original gives the one expert the weight 1"),
        ({"top_k": 4}, "top_k=4 must be in 1..num_experts=3"),
        ({"act_fn": "gelu_new"}, "act_fn='gelu_new' must be 'silu'"),
        ({"num_experts": ...}, "num_experts is missing"),
        ({"use_dora": True}, "use_dora=True changes the adapter and is not supported for MIXLORA"),
        ({"expert_lora": {"use_dora": True}}, "expert_lora.use_dora=True must be false: a mixture here is made"),
        ({"expert_lora": {"r": 2, "rank_pattern": {}}}, "expert_lora.rank_pattern={} is not a known key"),
        ({"expert_lora": 2}, "expert_lora=2 must be a mapping"),
        ({"top_p": 0.8}, "top_p=0.8 is a key of routing_strategy='mixlora-dynamic'"),
        ({"a_field_of_next_year": 1}, "a_field_of_next_year=1 changes the adapter and is not supported"),
        ({"target_modules": ["qkv_proj", "up_proj"]}, "target_modules has 'qkv_proj'"),
    ],
    ids=str,
)
def test_what_cannot_be_computed_is_refused_by_name(
    changes: dict[str, Any], message: str, model: LlamaForCausalLM, folder: Path
) -> None:
    change_config(folder, **changes)
    text = refusal(model, folder)
    assert message in text
    assert CONFIG in text


def test_settings_that_do_not_fit_the_weights(model: LlamaForCausalLM, folder: Path) -> None:
    change_config(folder, expert_lora=...)
    assert f"{PICKLE}: mixlora.layers.0.mlp.gate_proj.experts.0.lora_A.weight has shape [2, 16]" in refusal(
        model, folder
    )
    change_config(folder, target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"])
    assert f"{PICKLE} has mixlora.layers.0.self_attn.o_proj.lora_A.weight" in refusal(model, folder)


def test_a_default_that_the_original_leaves_out(model: LlamaForCausalLM, folder: Path) -> None:
    change_config(folder, top_k=..., act_fn=...)
    load_adapter(model, folder)
    torch.testing.assert_close(logits_of(model, "qa"), TRUTH["expert-lora"], rtol=0, atol=1e-4)


def test_every_cut_of_the_pickle_is_refused(model: LlamaForCausalLM, folder: Path) -> None:
    whole = (folder / PICKLE).read_bytes()
    for length in (0, 1, 4, 100, len(whole) // 2, len(whole) - 1000, len(whole) - 1):
        (folder / PICKLE).write_bytes(whole[:length])
        assert "is damaged, or holds more than weights, and is not opened" in refusal(model, folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(1)], "must hold a dictionary of tensors, not list"),
        ({"x": 1.0}, "the entry 'x' is not a dense tensor with a name"),
        ({1: torch.zeros(1)}, "the entry 1 is not a dense tensor with a name"),
        ({"x": torch.zeros(2, 2).to_sparse()}, "the entry 'x' is not a dense tensor"),
        ({"classifier": torch.zeros(2, 16)}, "has the head of a classifier"),
        ({}, "lacks mixlora.layers.0.mlp.down_proj.experts.0.lora_A.weight"),
    ],
    ids=["list", "number", "no name", "sparse", "classifier", "nothing"],
)
def test_a_pickle_of_other_things_is_refused(
    content: object, message: str, model: LlamaForCausalLM, folder: Path
) -> None:
    torch.save(content, folder / PICKLE)
    text = refusal(model, folder)
    assert message in text
    assert PICKLE in text


def test_a_pickle_that_peft_used_to_write(tmp_path: Path) -> None:
    """Before PEFT saved safetensors, its folders held an ``adapter_model.bin``, too."""
    settings = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 38, "num_hidden_layers": 2}
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    hf = hf_model("llama", {**settings, "rms_norm_eps": 1e-6, "tie_word_embeddings": False})
    ours = twin_of(hf, tiny_config())
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["q_proj", "down_proj"])
    theirs = peft.get_peft_model(hf, config).eval()
    randomize({name: weight for name, weight in theirs.named_parameters() if "lora_" in name}, seed=3, std=0.2)
    theirs.save_pretrained(str(tmp_path / "qa"), safe_serialization=False)
    assert (tmp_path / "qa" / PICKLE).is_file()
    load_adapter(ours, tmp_path / "qa")
    sample = torch.tensor([5, 9, 40, 2])
    with torch.no_grad():
        expected = theirs(input_ids=sample[None]).logits[0]
    (output,) = ours(ModelInput(sample, torch.tensor([0, 4], dtype=torch.int32), (BatchConfig("qa", 0, 1),)))
    assert_close(output.logits, expected, 1e-4)


def test_it_trains_on(model: LlamaForCausalLM) -> None:
    load_adapter(model, FIXTURES / "expert-lora", "qa")
    model.train()
    lengths = TRUTH["lengths"]
    cu_seqlens = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    samples = TRUTH["samples"]
    optimizer = torch.optim.AdamW(model.adapter_parameters("qa"), lr=1e-2)
    losses = []
    for _ in range(5):
        (output,) = model(ModelInput(samples, cu_seqlens, (BatchConfig("qa", 0, len(lengths)),), labels=samples))
        (output.loss + output.aux_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    assert losses[-1] < losses[0]
