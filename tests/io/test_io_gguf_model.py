"""GGUF files load to the weights that the gguf package reads in them and the logits that transformers gets."""

import sys

import gguf
import numpy as np
import pytest
import torch
import transformers
from builders import assert_close, random_samples
from gguf import GGMLQuantizationType
from gguf_maker import hf_weights_of, write_gguf
from gguf_models import SIZES, config_with, logits_of, small_model, tiny_model
from hf_twin import our_name
from load_memory import peak_of_loading

from moe_peft import load_base_model
from moe_peft.io import gguf_model as gguf_model_module
from moe_peft.io.gguf_file import read_gguf_header

KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q6_K"]
FAMILIES = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama wide heads": ("llama", {"head_dim": 64}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 64}),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks of rows even in a small tensor, the last one shorter."""
    monkeypatch.setattr(gguf_model_module, "_BLOCK_VALUES", 256 * 7)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_dequantizes_as_the_gguf_package_does(kind, tmp_path):
    theirs = small_model()
    path = tmp_path / "model.gguf"
    write_gguf(path, theirs, GGMLQuantizationType[kind])
    expected = {our_name(name): weight for name, weight in hf_weights_of(path, theirs).items()}
    for dtype in (torch.float32, torch.bfloat16):
        ours = load_base_model(path, dtype=dtype, device="cpu")
        actual = dict(ours.named_parameters())
        assert sorted(actual) == sorted(expected)
        for name, weight in actual.items():
            assert torch.equal(weight, expected[name].to(dtype)), name
            assert not weight.requires_grad
        assert not ours.training


@pytest.mark.parametrize("kind", ["F32", "Q4_1", "Q6_K"])
@pytest.mark.parametrize("case", FAMILIES)
def test_logits_are_those_of_transformers_on_the_same_file(case, kind, tmp_path):
    family, settings = FAMILIES[case]
    write_gguf(tmp_path / "model.gguf", small_model(family, **settings), GGMLQuantizationType[kind])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path,
        gguf_file="model.gguf",
        dtype=torch.float32,
        # Its GGUF reader does not look at Qwen3's head size.
        **({"head_dim": settings["head_dim"]} if family == "qwen3" else {}),
    ).eval()
    ours = load_base_model(tmp_path / "model.gguf", dtype="float32", device="cpu")
    sample = random_samples([40], vocab=SIZES["vocab_size"])[0]
    with torch.no_grad():
        expected = theirs(torch.tensor([sample])).logits[0]
    assert_close(logits_of(ours, sample), expected, 1e-4, case)


def test_biases_are_found_and_permuted(tmp_path):
    theirs = small_model(attention_bias=True, mlp_bias=True)
    write_gguf(tmp_path / "model.gguf", theirs)
    ours = load_base_model(tmp_path / "model.gguf", device="cpu")
    assert ours.config_.attention_bias
    assert ours.config_.mlp_bias
    for name, weight in theirs.named_parameters():
        assert torch.equal(ours.get_parameter(our_name(name)), weight), name


def test_mistral_calls_itself_llama_and_keeps_its_window(tmp_path):
    theirs = small_model("mistral", sliding_window=5)
    write_gguf(tmp_path / "model.gguf", theirs, metadata={"attention.sliding_window": 5})
    ours = load_base_model(tmp_path / "model.gguf", device="cpu")
    sample = random_samples([40], vocab=SIZES["vocab_size"])[0]
    with torch.no_grad():
        expected = theirs(torch.tensor([sample])).logits[0]
    assert_close(logits_of(ours, sample), expected, 1e-4)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("F32", torch.float32), ("F16", torch.float32), ("BF16", torch.bfloat16), ("Q8_0", torch.bfloat16)],
)
def test_auto_dtype(kind, expected, tmp_path, monkeypatch):
    write_gguf(tmp_path / "model.gguf", tiny_model(), GGMLQuantizationType[kind])
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    assert load_base_model(tmp_path / "model.gguf", device="cpu").dtype == expected
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False}, raising=False)
    assert load_base_model(tmp_path / "model.gguf", device="cpu").dtype == torch.float32


def test_tensors_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match=r"has 1 tensor: blk\.0\.attn_sinks that this architecture does not take"):
        config_with(tmp_path, extra_tensors={"blk.0.attn_sinks": np.ones(4, dtype=np.float32)})
    with pytest.raises(ValueError, match=r"lacks 9 tensors: blk\.1\.attn_q"):
        config_with(tmp_path, metadata={"block_count": 2})


@pytest.mark.parametrize("kind", ["TQ1_0", "I32"])
def test_other_kinds_are_refused_by_name(kind, tmp_path):
    quantized = gguf.quants.quantize(np.ones((4, 256), np.float32), GGMLQuantizationType.TQ1_0)
    extra = quantized if kind == "TQ1_0" else np.ones(4, dtype=np.int32)
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("output.weight", extra, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=rf"output\.weight has the type {kind}, which is not supported"):
        load_base_model(path, device="cpu")


def test_cut_files(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, tiny_model(), GGMLQuantizationType.Q8_0)
    whole = path.read_bytes()
    tensors = read_gguf_header(path).tensors.values()
    end = max(tensor.offset + tensor.num_bytes for tensor in tensors)
    for length in (0, 3, 4, 24, 300, len(whole) // 3, len(whole) // 2, end - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"model\.gguf (is truncated or corrupted|is not a GGUF file)"):
            load_base_model(path, device="cpu")


def test_garbled_headers_never_escape_as_another_error(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, tiny_model(), GGMLQuantizationType.Q8_0)
    whole = path.read_bytes()
    header_end = min(tensor.offset for tensor in read_gguf_header(path).tensors.values())
    generator = np.random.default_rng(0)
    num_refused = 0
    for _ in range(200):
        damaged = bytearray(whole)
        for place in generator.integers(4, header_end, 3):
            damaged[place] = generator.choice([0, 1, 127, 255])
        path.write_bytes(damaged)
        try:
            load_base_model(path, device="cpu")
        except ValueError as error:
            num_refused += 1
            assert "model.gguf" in str(error)
    assert num_refused > 100


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_the_weights_and_little_more(tmp_path):
    settings = {"hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 16_000, "max_position_embeddings": 64}
    with torch.device("meta"):
        meta = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**settings, num_hidden_layers=1, num_attention_heads=8)
        )
    theirs = meta.to_empty(device="cpu")
    for weight in theirs.parameters():
        torch.nn.init.constant_(weight, 0.5)
    num_parameters = sum(weight.numel() for weight in theirs.parameters())
    write_gguf(tmp_path / "model.gguf", theirs, GGMLQuantizationType.Q4_K)
    del theirs
    peak = peak_of_loading(tmp_path / "model.gguf", "float32")
    weights = 4 * num_parameters
    assert weights > 130 << 20
    assert 0.99 * weights <= peak <= 1.2 * weights + (64 << 20)
