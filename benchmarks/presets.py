"""The models that the benchmarks run on: one real, the others random weights in a real shape."""

import torch
from torch import nn

from moe_peft.io.base_model import load_base_model
from moe_peft.model.config import LlamaConfig, RopeScaling
from moe_peft.model.llama import LlamaForCausalLM

REAL = ("smollm2-135m",)
SHAPES = {
    "tinyllama-1.1b": LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
    ),
    "llama-7b": LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=4096,
    ),
    "llama3-8b": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        rope_scaling=RopeScaling(rope_type="llama3", factor=8.0, original_max_position_embeddings=8192),
    ),
    "tiny": LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
}
PRESETS = (*REAL, *SHAPES)


def build_model(preset: str, dtype: torch.dtype, device: torch.device) -> LlamaForCausalLM:
    """A preset's model, frozen.

    Args:
        preset: one of ``PRESETS``, or what ``load_base_model`` takes (a Hugging Face folder, say).
        dtype: of its weights.
        device: where they go.
    """
    return random_model(SHAPES[preset], dtype, device) if preset in SHAPES else load_base_model(preset, dtype, device)


def random_model(config: LlamaConfig, dtype: torch.dtype, device: torch.device) -> LlamaForCausalLM:
    """A model of this shape, its weights drawn in place: it never takes more memory than they do."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in list(model.named_parameters()):  # a tied head stands once
        weight = torch.empty(parameter.shape, dtype=dtype, device=device)
        if weight.dim() > 1:
            weight.normal_(std=0.02, generator=generator)
        else:
            weight.fill_(1.0)
        module_name, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module_name), attribute, nn.Parameter(weight, requires_grad=False))
    if config.tie_word_embeddings:
        model.lm_head_.weight = model.embed_tokens.weight
    return model
