"""Small random models, written as GGUF and read back."""

import torch
from builders import Run, fuse
from gguf_maker import write_gguf
from hf_twin import hf_model

from moe_peft import load_base_model

# A quantized row is a multiple of 256; there are more query heads than key heads, and several blocks of rows.
SIZES = {
    "vocab_size": 300,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def small_model(family="llama", seed=0, **settings):
    return hf_model(family, {**SIZES, **settings}, seed=seed)


def tiny_model(**settings):
    """Quick to write: for tests about everything but numbers."""
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    return small_model(**{**sizes, "num_key_value_heads": 1, "num_hidden_layers": 1, **settings})


def logits_of(model, sample):
    with torch.no_grad():
        return model(fuse(Run("", [sample]), with_labels=False))[0].logits


def config_with(tmp_path, model=None, **written):
    path = tmp_path / "model.gguf"
    write_gguf(path, model or tiny_model(), **written)
    return load_base_model(path, device="cpu").config_
