"""Small Hugging Face model folders, written by transformers, and ways to spoil them."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from hf_twin import hf_model, our_name
from safetensors.torch import load_file, save_file

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def save_model(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **settings) -> torch.nn.Module:
    """A random transformers model, saved by transformers."""
    shard = settings.pop("max_shard_size", "1GB")
    model = hf_model(family, {**SIZES, **settings}, dtype=dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def assert_same_weights(ours: torch.nn.Module, theirs: torch.nn.Module, dtype: torch.dtype) -> None:
    expected = {our_name(name): weight.to(dtype) for name, weight in theirs.named_parameters()}
    actual = dict(ours.named_parameters())
    assert sorted(actual) == sorted(expected)
    for name, weight in actual.items():
        assert weight.dtype == dtype, name
        assert not weight.requires_grad, name
        assert torch.equal(weight, expected[name]), name


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)


def edit_config(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
