"""A base model from disk: every family, every dtype, no surprise in memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from builders import Run, assert_close, fuse, random_samples
from hf_folders import assert_same_weights, edit_config, save_model
from load_memory import peak_of_loading
from safetensors.torch import save_file

from moe_peft import LoraConfig, load_base_model, save_adapter
from moe_peft.io import base_model as base_model_module

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FAMILY_CASES = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama biases, wide heads": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 12}),
    "llama3 rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "mistral": ("mistral", {"sliding_window": 5}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 10}),
}


@pytest.fixture
def folder(tmp_path):
    """A saved LLaMA of one file, to be damaged."""
    save_model(tmp_path)
    return tmp_path


@pytest.mark.parametrize("case", FAMILY_CASES)
def test_every_family_has_the_weights_and_logits_of_transformers(case, tmp_path):
    family, settings = FAMILY_CASES[case]
    theirs = save_model(tmp_path, family, **settings)
    ours = load_base_model(tmp_path, device="cpu")
    assert not ours.training
    assert_same_weights(ours, theirs, torch.float32)
    sample = random_samples([40])[0]
    with torch.no_grad():
        expected = theirs(torch.tensor([sample])).logits[0]
        actual = ours(fuse(Run("", [sample]), with_labels=False))[0].logits
    assert_close(actual, expected, 1e-4, case)


def test_a_tied_head_is_one_parameter(tmp_path):
    save_model(tmp_path, tie_word_embeddings=True)
    model = load_base_model(tmp_path, device="cpu")
    assert model.lm_head_.weight is model.embed_tokens.weight


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("wanted", [*DTYPES, "float64"])
def test_every_dtype_into_every_dtype(stored, wanted, tmp_path):
    theirs = save_model(tmp_path, dtype=DTYPES[stored])
    dtype = getattr(torch, wanted)
    assert_same_weights(load_base_model(tmp_path, dtype=wanted, device="cpu"), theirs, dtype)


@pytest.mark.parametrize("has_bfloat16", [True, False])
@pytest.mark.parametrize("stored", DTYPES)
def test_auto_dtype_is_the_files_where_the_device_computes_it(stored, has_bfloat16, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has_bfloat16}, raising=False)
    save_model(tmp_path, dtype=DTYPES[stored])
    expected = torch.bfloat16 if stored == "bfloat16" and has_bfloat16 else torch.float32
    assert load_base_model(tmp_path, device="cpu").dtype == expected


def test_an_adapters_folder_names_the_base_it_was_made_on(folder, tmp_path):
    model = load_base_model(folder, device="cpu")
    model.add_adapter("qa", LoraConfig(r=2))
    save_adapter(model, "qa", tmp_path / "qa")
    assert json.loads((tmp_path / "qa" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(folder)


def test_the_file_may_change_after_loading(folder):
    model = load_base_model(folder, device="cpu")
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    path = folder / "model.safetensors"
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.write(b"\xff" * size)
    os.truncate(path, 0)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name])


def test_a_config_for_other_weights(folder):
    edit_config(folder, num_hidden_layers=3, layer_types=None)
    with pytest.raises(ValueError, match=r"lacks 9 tensors: model\.layers\.2\..* and 5 more"):
        load_base_model(folder, device="cpu")
    edit_config(folder, num_hidden_layers=10**9)
    with pytest.raises(ValueError, match="has 21 tensors, too few for 1000000000 layers"):
        load_base_model(folder, device="cpu")
    edit_config(folder, num_hidden_layers=2, intermediate_size=2**62)
    with pytest.raises(ValueError, match="no model has the sizes of"):
        load_base_model(folder, device="cpu")
    edit_config(folder, intermediate_size=2**80)
    with pytest.raises(ValueError, match="no model has the sizes of"):
        load_base_model(folder, device="cpu")
    edit_config(folder, intermediate_size=44, vocab_size=64)
    with pytest.raises(ValueError, match=r"embed_tokens\.weight has shape \[61, 32\] .*\[64, 32\] \(and 1 more\)"):
        load_base_model(folder, device="cpu")


def test_wrong_arguments_are_refused_before_anything_is_read(tmp_path):
    with pytest.raises(ValueError, match="dtype='bloat16'"):
        load_base_model(tmp_path / "missing", dtype="bloat16")
    with pytest.raises(ValueError, match="device='cdua'"):
        load_base_model(tmp_path / "missing", device="cdua")
    with pytest.raises(FileNotFoundError, match="missing"):
        load_base_model(tmp_path / "missing")


def test_building_imports_no_compiler(folder):
    """Initializing meta tensors would import torch's compiler: seconds, and more memory than a small model."""
    script = (
        "import sys, moe_peft; before = set(sys.modules); moe_peft.load_base_model(sys.argv[1], device='cpu'); "
        "sys.exit(any(name.startswith(('sympy', 'torch._')) for name in set(sys.modules) - before))"
    )
    assert subprocess.run([sys.executable, "-c", script, str(folder)], check=False).returncode == 0


def test_nothing_stays_unfilled(folder, monkeypatch):
    """Every weight is written: none keeps what the allocator happened to give."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() and not tensor.is_meta else tensor

    monkeypatch.setattr(base_model_module.torch, "empty", poisoned)
    model = load_base_model(folder, device="cpu")
    assert all(bool(weight.isfinite().all()) for weight in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_onto_a_gpu(folder):
    on_cpu = load_base_model(folder, dtype="bfloat16", device="cpu")
    on_gpu = load_base_model(folder, dtype="bfloat16", device="cuda")
    for name, weight in on_gpu.named_parameters():
        assert weight.is_cuda
        assert torch.equal(weight.cpu(), on_cpu.get_parameter(name))


def save_big_model(folder: Path) -> int:
    """About 50 million float32 parameters in shards of 64 MB; their number."""
    config = transformers.LlamaConfig(
        vocab_size=16_000,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in transformers.LlamaForCausalLM(config).named_parameters()}
    config.save_pretrained(folder)
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        shard[name] = torch.full(shape, 0.5)
        if sum(tensor.nbytes for tensor in shard.values()) > 48 << 20 or name == list(shapes)[-1]:
            file_name = f"model-{len(set(weight_map.values()))}.safetensors"
            save_file(shard, folder / file_name)
            weight_map |= dict.fromkeys(shard, file_name)
            shard = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert len(set(weight_map.values())) > 2
    return sum(shape.numel() for shape in shapes.values())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_peak_memory_is_the_weights_and_little_more(dtype, tmp_path):
    num_parameters = save_big_model(tmp_path)
    weights = num_parameters * (2 if dtype == "bfloat16" else 4)
    assert weights > 80 << 20
    # A little is taken from what importing the package has freed.
    assert 0.99 * weights <= peak_of_loading(tmp_path, dtype) <= 1.2 * weights + (64 << 20)
