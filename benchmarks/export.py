"""A preset as a Hugging Face folder, for those who read nothing else."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from presets import SHAPES, build_model
from safetensors.torch import save_file

from moe_peft.model.config import LlamaConfig

WITHOUT_WEIGHTS = ("tinyllama-1.1b", "llama-7b", "llama3-8b")  # random: each side draws its own, in place


def export_preset(preset: str, folder: Path) -> Path:
    """Write ``config.json`` and, but for ``WITHOUT_WEIGHTS``, ``model.safetensors`` in float32.

    Args:
        preset: one of `presets.PRESETS`.
        folder: is made; one that is there already is left as it is.

    Returns:
        The folder.
    """
    config_file = folder / "config.json"
    if config_file.is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    if preset in WITHOUT_WEIGHTS:
        config = SHAPES[preset]
    else:
        model = build_model(preset, torch.float32, torch.device("cpu"))
        config = model.config_
        tensors = {_hf_name(name): weight.detach().contiguous() for name, weight in model.named_parameters()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config_file.write_text(json.dumps(_hf_config(config), indent=2))  # last: it says that the folder is whole
    return folder


def _hf_name(name: str) -> str:
    return "lm_head.weight" if name == "lm_head_.weight" else "model." + name.replace(".base_layer_.", ".")


def _hf_config(config: LlamaConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    if scaling is not None and scaling.rope_type != "llama3":
        raise ValueError(f"rope_type={scaling.rope_type!r} must be llama3, or there must be no rope_scaling")
    sizes = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_theta",
        "tie_word_embeddings",
    )
    llama3 = ("rope_type", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "torch_dtype": "float32",
        **{name: getattr(config, name) for name in sizes},
        "rope_scaling": None if scaling is None else {name: asdict(scaling)[name] for name in llama3},
    }
