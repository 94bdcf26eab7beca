"""GGUF files of small transformers models, as llama.cpp's converter and quantizer would write them."""

from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType

HF_TO_GGUF = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(hf_name: str) -> str:
    module, _, kind = hf_name.rpartition(".")
    if not module.startswith("model.layers."):
        return f"{HF_TO_GGUF[module]}.{kind}"
    _, _, layer, inner = module.split(".", 3)
    return f"blk.{layer}.{HF_TO_GGUF[inner]}.{kind}"


def interleave(values: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of each head from RoPE's halves order to llama.cpp's pairs order, one row at a time."""
    head = values.shape[0] // num_heads
    rows = []
    for first in range(0, values.shape[0], head):
        for pair in range(head // 2):
            rows += [values[first + pair], values[first + head // 2 + pair]]
    return np.stack(rows)


def deinterleave(values: np.ndarray, num_heads: int) -> np.ndarray:
    """The inverse of `interleave`."""
    head = values.shape[0] // num_heads
    rows = []
    for first in range(0, values.shape[0], head):
        rows += [values[first + 2 * pair] for pair in range(head // 2)]
        rows += [values[first + 2 * pair + 1] for pair in range(head // 2)]
    return np.stack(rows)


def encode(values: np.ndarray, kind: GGMLQuantizationType, seed: int = 0) -> np.ndarray:
    """The bytes of a tensor; of the K kinds, which the package cannot quantize to, any valid blocks of that shape."""
    if kind not in (GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q6_K):
        return gguf.quants.quantize(values, kind)
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (values.size // block_size, block_bytes), dtype=np.uint8)
    scales = generator.uniform(1e-5, 1e-4, (len(blocks), 2)).astype(np.float16)
    if kind == GGMLQuantizationType.Q4_K:
        blocks[:, :4] = scales.view(np.uint8)
    else:
        blocks[:, -2:] = scales[:, :1].copy().view(np.uint8)
    return blocks.reshape(values.shape[0], -1)


def write_gguf(
    path: Path,
    model: torch.nn.Module,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    *,
    architecture: str | None = None,
    metadata: dict[str, object] | None = None,
    extra_tensors: dict[str, np.ndarray] | None = None,
) -> None:
    """Write a transformers model as GGUF: matrices of this kind, vectors in float32.

    Args:
        metadata: more keys, without the architecture's name; None removes one.
    """
    config = model.config
    architecture = architecture or {"mistral": "llama"}.get(config.model_type, config.model_type)
    keys: dict[str, object] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "vocab_size": config.vocab_size,
    }
    if getattr(config, "head_dim", None) is not None:
        keys |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
        keys |= {"rope.dimension_count": config.head_dim}
    keys |= metadata or {}

    writer = gguf.GGUFWriter(path, architecture)
    for name, value in keys.items():
        key = name if name.startswith(("general.", "split.")) else f"{architecture}.{name}"
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
    for name, weight in model.named_parameters():
        values = weight.detach().float().numpy()
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            num_heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            values = interleave(values, num_heads)
        used = kind if values.ndim == 2 else GGMLQuantizationType.F32
        writer.add_tensor(gguf_name(name), encode(values, used, seed=len(name)), raw_dtype=used)
    for name, values in (extra_tensors or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def hf_weights_of(path: Path, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What the file says each of the model's weights is, through the gguf package alone."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    architecture = gguf.GGUFReader(path).get_field("general.architecture").contents()
    weights = {}
    for name, weight in model.named_parameters():
        tensor = tensors[gguf_name(name)]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(weight.shape)
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            config = model.config
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            values = deinterleave(values, heads)
        weights[name] = torch.from_numpy(values.astype(np.float32))
    return weights
