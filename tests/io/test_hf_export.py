"""Folders written for Hugging Face: transformers and this project load them, and both answer as the adapter did."""

import json

import pytest
import torch
import transformers
from builders import Run, add_random_adapter, assert_close, fuse, random_samples, tiny_config, tiny_model
from gguf_maker import write_gguf
from gguf_models import small_model
from hf_folders import SIZES, edit_config, save_model
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_run import make_base_folder, make_base_gguf

from moe_peft import LlamaConfig, LoraConfig, RopeScaling, load_base_model, load_tokenizer, save_merged_model
from moe_peft.io.hf_config import llama_config_from_dict
from moe_peft.io.hf_config_fields import hf_config_fields
from moe_peft.io.hf_export import HfExport, parse_size

SAMPLES = random_samples((9, 1, 30))
ROPES = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 24.0},
}  # fmt: skip
CASES = {
    "plain": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 10}),
    **{
        kind: ("llama", {"rope_parameters": {"rope_theta": 5000.0, **rope}, "max_position_embeddings": 64})
        for kind, rope in ROPES.items()
    },
    "mistral": ("mistral", {"sliding_window": None}),
    "window": ("mistral", {"sliding_window": 5}),
    "qwen2": ("qwen2", {}),
    "qwen2_window": ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0}),
    "qwen3": ("qwen3", {"attention_bias": True, "head_dim": 12}),
}


def ours(model, name, sample):
    with torch.no_grad():
        return model(fuse(Run(name, [sample]), with_labels=False))[0].logits


def theirs(folder, sample, **settings):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **settings)
    with torch.no_grad():
        return model.eval()(torch.tensor([sample])).logits[0]


def assert_both_answer(folder, expected, tolerance=1e-4):
    again = load_base_model(folder, device="cpu")
    for sample, logits in zip(SAMPLES, expected, strict=True):
        assert_close(ours(again, "", sample), logits, tolerance, "ours")
        assert_close(theirs(folder, sample), logits, tolerance, "transformers'")


@pytest.mark.parametrize("with_source", [True, False], ids=["own_config", "made_config"])
@pytest.mark.parametrize("case", CASES)
def test_the_folder_answers_as_the_adapter(tmp_path, case, with_source):
    family, settings = CASES[case]
    save_model(tmp_path / "base", family, **settings)
    model = load_base_model(tmp_path / "base", device="cpu")
    add_random_adapter(model, "qa", LoraConfig(r=3), seed=4)
    expected = [ours(model, "qa", sample) for sample in SAMPLES]
    assert (expected[0] - ours(model, "", SAMPLES[0])).abs().max() > 1e-2
    save_merged_model(model, "qa", tmp_path / "out", source=tmp_path / "base" if with_source else None)
    assert_both_answer(tmp_path / "out", expected)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    # A Mistral without a window is a LLaMA.
    assert config["model_type"] == (family if with_source or case != "mistral" else "llama")
    assert [torch.equal(ours(model, "qa", sample), e) for sample, e in zip(SAMPLES, expected, strict=True)]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_from_a_gguf_file(tmp_path, family):
    write_gguf(tmp_path / "base.gguf", small_model(family))
    model = load_base_model(tmp_path / "base.gguf", dtype="float32", device="cpu")
    add_random_adapter(model, "qa", LoraConfig(r=3), seed=4, std=0.05)
    expected = [ours(model, "qa", sample) for sample in SAMPLES]
    assert (expected[0] - ours(model, "", SAMPLES[0])).abs().max() > 1e-2
    save_merged_model(model, "qa", tmp_path / "out")
    assert_both_answer(tmp_path / "out", expected)


def test_a_tokenizer_that_cannot_be_had_is_named_with_the_way_out(tmp_path):
    write_gguf(tmp_path / "base.gguf", small_model())
    model = load_base_model(tmp_path / "base.gguf", device="cpu")
    with pytest.raises(ValueError, match=r"base\.gguf holds no tokenizer: .*; with_tokenizer=False \(--no-tokenizer\)"):
        save_merged_model(model, "", tmp_path / "out", source=tmp_path / "base.gguf")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_are_rounded_once_and_the_model_stays(tmp_path, dtype):
    model = tiny_model(tiny_config(tie_word_embeddings=True))
    add_random_adapter(model, "qa", LoraConfig(r=3), seed=4)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    save_merged_model(model, "qa", tmp_path / "out", dtype=dtype)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    linear = model.layers[1].mlp.up_proj
    lora = linear.loras_["qa"]
    delta = lora.scaling_ * (lora.lora_B @ lora.lora_A).detach()
    assert torch.equal(tensors["model.layers.1.mlp.up_proj.weight"], (linear.base_layer_.weight + delta).to(dtype))
    assert torch.equal(tensors["model.embed_tokens.weight"], model.embed_tokens.weight.to(dtype))
    assert "lm_head.weight" not in tensors
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert load_base_model(tmp_path / "out", device="cpu").config_ == model.config_
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == dtype


def test_what_is_merged_already_is_written_as_it_stands(tmp_path):
    model = tiny_model()
    add_random_adapter(model, "qa", LoraConfig(r=3), seed=4)
    save_merged_model(model, "qa", tmp_path / "beside")
    save_merged_model(model, "", tmp_path / "plain")
    model.merge_adapter("qa")
    save_merged_model(model, "qa", tmp_path / "merged")
    save_merged_model(model, "", tmp_path / "bare")
    beside, plain, merged, bare = (
        load_file(tmp_path / name / "model.safetensors") for name in ("beside", "plain", "merged", "bare")
    )
    assert all(torch.equal(merged[name], beside[name]) and torch.equal(bare[name], beside[name]) for name in beside)
    assert not torch.equal(plain["model.layers.0.mlp.up_proj.weight"], beside["model.layers.0.mlp.up_proj.weight"])


def test_shards_and_their_index(tmp_path):
    model = tiny_model()
    add_random_adapter(model, "qa", LoraConfig(r=3), seed=4)
    save_merged_model(model, "qa", tmp_path / "whole")
    seen = []
    export = HfExport(model, "qa", max_shard_size="8kB")
    export.write(tmp_path / "out", on_tensor=lambda *progress: seen.append(progress))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert set(index["weight_map"].values()) == set(files)
    found = {}
    for name in files:
        with safe_open(tmp_path / "out" / name, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= 8000 or len(tensors) == 1
        found |= tensors
    assert found.keys() == whole.keys() == index["weight_map"].keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    total = sum(tensor.nbytes for tensor in whole.values())
    assert index["metadata"]["total_size"] == total
    assert (export.num_bytes, export.num_files) == (total, len(files))
    assert [name for name, _ in seen] == list(index["weight_map"])
    assert seen[0][1] == 0
    assert seen[-1][1] + whole[seen[-1][0]].nbytes == total
    assert_close(theirs(tmp_path / "out", SAMPLES[0]), ours(model, "qa", SAMPLES[0]), 1e-4)
    load_base_model(tmp_path / "out", device="cpu")


def test_tokenizer_and_generation_settings_come_along(tmp_path):
    base = make_base_folder(tmp_path / "base")
    (base / "generation_config.json").write_text('{"eos_token_id": [2, 3], "temperature": 0.5}')
    (base / "notes.txt").write_text("not of the model")
    model = load_base_model(base, device="cpu")
    add_random_adapter(model, "qa", LoraConfig())
    save_merged_model(model, "qa", tmp_path / "out", source=base)
    names = ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        ["config.json", "model.safetensors", *names]
    )
    assert all((tmp_path / "out" / name).read_bytes() == (base / name).read_bytes() for name in names)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["eos_token_id"], config["torch_dtype"]) == (2, "float32")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded("Repeat 3").input_ids == load_tokenizer(base).encode("Repeat 3")


def test_the_tokenizer_may_stay_behind(tmp_path):
    base = make_base_folder(tmp_path / "base")
    (base / "generation_config.json").write_text('{"eos_token_id": 2}')
    save_merged_model(load_base_model(base, device="cpu"), "", tmp_path / "out", source=base, with_tokenizer=False)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["config.json", "generation_config.json", "model.safetensors"]
    path = make_base_gguf(tmp_path / "base.gguf")
    save_merged_model(load_base_model(path, device="cpu"), "", tmp_path / "gguf", source=path, with_tokenizer=False)
    assert sorted(path.name for path in (tmp_path / "gguf").iterdir()) == ["config.json", "model.safetensors"]


def test_a_gguf_files_tokenizer_becomes_a_tokenizer_json(tmp_path):
    path = make_base_gguf(tmp_path / "base.gguf")
    model, tokenizer = load_base_model(path, dtype="float32", device="cpu"), load_tokenizer(path)
    save_merged_model(model, "", tmp_path / "out", source=path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    again = load_tokenizer(tmp_path / "out")
    for text in ("Below is an instruction", " a  b\n", "x<turn>y</s>", "Größe 12345 🙂"):
        assert loaded(text).input_ids == again.encode(text) == tokenizer.encode(text)
        assert loaded.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text), False)
    assert (loaded.bos_token_id, loaded.eos_token_id) == (1, 2)
    assert again.eos_token_ids == tokenizer.eos_token_ids == (2,)


@pytest.mark.parametrize(
    ("size", "expected"),
    [("5GB", 5 * 10**9), ("1.5 MB", 1500000), ("2GiB", 2**31), (12, 12), ("700", 700), ("3kb", 3000)],
)
def test_sizes(size, expected):
    assert parse_size(size) == expected


@pytest.mark.parametrize("size", ["", "big", "5XB", "-1GB", 0, "0GB", "9" * 400, f"{'9' * 400}GB", 10**400, "9e6TB"])
def test_what_is_no_size(size):
    rule = r"max_shard_size=.* must be a number of bytes above 0 and below 2\*\*63, such as 5GB"
    with pytest.raises(ValueError, match=rule) as refusal:
        parse_size(size)
    assert len(str(refusal.value)) < 200


def test_a_dtype_is_taken_as_load_base_model_takes_it(tmp_path):
    model = tiny_model()
    save_merged_model(model, "", tmp_path / "named", dtype="bf16")
    save_merged_model(model, "", tmp_path / "own", dtype=torch.bfloat16)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("named", "own")]
    assert files[0] == files[1]
    for dtype in (torch.int8, "int8", 5):
        with pytest.raises(ValueError, match=r"dtype='.*' must be one of auto, float64, float32, bfloat16, float16"):
            save_merged_model(model, "", tmp_path / "bad", dtype=dtype)
    with pytest.raises(ValueError, match="adapter None is not attached"):
        save_merged_model(model, None, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(FileExistsError, match="already exists and is not empty"):
        save_merged_model(tiny_model(), "", tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


def test_a_failure_half_way_leaves_nothing(tmp_path):
    model = tiny_model()
    add_random_adapter(model, "qa", LoraConfig())
    with torch.no_grad():
        model.layers[1].mlp.down_proj.loras_["qa"].lora_A[0, 0] = float("inf")
    with pytest.raises(ValueError, match="would hold values that are not finite"):
        save_merged_model(model, "qa", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_another_models_config_is_refused(tmp_path):
    save_model(tmp_path / "base")
    model = load_base_model(tmp_path / "base", device="cpu")
    edit_config(tmp_path / "base", rms_norm_eps=0.5)
    with pytest.raises(ValueError, match=r"config\.json describes another model than the one to be written"):
        save_merged_model(model, "", tmp_path / "out", source=tmp_path / "base")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qkv_bias": True, "mlp_bias": True}, "no Hugging Face model type has mlp_bias=True: the nearest, qwen2"),
        (
            {"sliding_window": 4, "attention_bias": True},
            "no Hugging Face model type has attention_bias=True: .* mistral",
        ),
        ({"qk_norm": True, "qkv_bias": True}, "no Hugging Face model type has qkv_bias=True: the nearest, qwen3"),
    ],
)
def test_a_shape_that_no_model_type_has_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        hf_config_fields(tiny_config(**changes))


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling(rope_type="yarn", factor=3.0),
        RopeScaling(rope_type="yarn", factor=3.0, attention_factor=1.2, mscale=0.7, mscale_all_dim=0.5, truncate=False),
        RopeScaling(rope_type="dynamic", factor=2.0, original_max_position_embeddings=8),
    ],
)
def test_rope_scaling_is_read_back(scaling):
    config = LlamaConfig(**SIZES, rope_scaling=scaling, rope_theta=12345.678)
    read = llama_config_from_dict(hf_config_fields(config))
    assert read.rope_theta == 12345.678
    for name in ("rope_type", "factor", "beta_fast", "attention_factor", "mscale", "mscale_all_dim", "truncate"):
        assert getattr(read.rope_scaling, name) == getattr(scaling, name), name
