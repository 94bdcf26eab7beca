"""The safetensors files of a folder: one or several, whole or refused by the file and tensor that is wrong."""

import json
import shutil

import pytest
import torch
from hf_folders import assert_same_weights, edit_weights, save_model

from moe_peft import load_base_model


@pytest.fixture
def folder(tmp_path):
    """A saved LLaMA of one file, to be damaged."""
    save_model(tmp_path)
    return tmp_path


def test_shards(tmp_path):
    theirs = save_model(tmp_path, max_shard_size="12KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_weights(load_base_model(tmp_path, device="cpu"), theirs, torch.float32)


def test_a_bare_decoder_without_prefix_and_with_old_buffers(tmp_path):
    theirs = save_model(tmp_path, tie_word_embeddings=True)

    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)
        tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    edit_weights(tmp_path, strip)
    assert_same_weights(load_base_model(tmp_path, device="cpu"), theirs, torch.float32)


def test_a_tied_models_file_may_repeat_the_head_but_not_contradict_it(tmp_path):
    theirs = save_model(tmp_path, tie_word_embeddings=True)
    edit_weights(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    assert_same_weights(load_base_model(tmp_path, device="cpu"), theirs, torch.float32)
    edit_weights(tmp_path, lambda tensors: tensors["lm_head.weight"].add_(1))
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight.*tie_word_emb"):
        load_base_model(tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
            r"lacks 1 tensor: model\.layers\.1\.mlp\.up_proj\.weight",
        ),
        (lambda t: t.pop("lm_head.weight"), r"lacks 1 tensor: lm_head\.weight"),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}),
            r"has 1 tensor: model\.layers\.0\.self_attn\.q_proj\.bias that this architecture does not take",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(31)}),
            r"model\.norm\.weight has shape \[31\] where the config says \[32\]",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}),
            r"model\.norm\.weight has dtype I8; it must be one of F64, F32, F16, BF16",
        ),
    ],
)
def test_tensors_that_do_not_fit(folder, change, message):
    edit_weights(folder, change)
    with pytest.raises(ValueError, match=message):
        load_base_model(folder, device="cpu")


def test_cut_and_garbled_safetensors(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    damaged = [whole[:length] for length in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1)]
    damaged += [b"\xff" * 8 + whole[8:], whole[:20] + b"\x00" * 20 + whole[40:], whole + b"more"]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.safetensors is truncated or corrupted"):
            load_base_model(folder, device="cpu")


def test_shards_that_do_not_fit_their_index(tmp_path):
    save_model(tmp_path, max_shard_size="12KB")
    index_path = tmp_path / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    some_tensor = "model.norm.weight"
    shard = tmp_path / index["weight_map"][some_tensor]

    aside = tmp_path / "aside"
    shard.rename(aside)
    with pytest.raises(ValueError, match=rf"lacks 1 of \d+ shards: {shard.name}"):
        load_base_model(tmp_path, device="cpu")
    aside.rename(shard)

    def expect(weight_map: object, message: str) -> None:
        index_path.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ValueError, match=message):
            load_base_model(tmp_path, device="cpu")

    other = next(name for name in set(index["weight_map"].values()) if name != shard.name)
    expect({**index["weight_map"], some_tensor: other}, rf"says that {some_tensor} is in {other}, but it is not")
    expect({**index["weight_map"], some_tensor: "../secret.safetensors"}, "it must be a file name")
    expect({**index["weight_map"], some_tensor: "weights.bin"}, r"it must be a \.safetensors file")
    expect([], "must have a weight_map")
    shutil.copy(shard, tmp_path / "copy.safetensors")
    expect({**index["weight_map"], some_tensor: "copy.safetensors"}, "stands in .* and in another file")
    index_path.write_text("{")
    with pytest.raises(ValueError, match=r"index\.json is not valid JSON"):
        load_base_model(tmp_path, device="cpu")


def test_pickles_are_never_opened(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        load_base_model(folder, device="cpu")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin, a pickle, .* never opened here: save the model as safe"):
        load_base_model(folder, device="cpu")
