"""The tensors of a GGUF file under the model's names, dequantized in blocks of rows."""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moe_peft.io.checkpoint import most_common_dtype
from moe_peft.io.gguf_config import read_gguf_config
from moe_peft.io.gguf_file import GgufFile, GgufTensor, read_gguf_header
from moe_peft.io.gguf_rope import with_baked_scaling
from moe_peft.model.config import LlamaConfig

# The types that are read, with the dtype that a file of mostly this type is best computed in.
_TYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    **dict.fromkeys(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q6_K"), torch.bfloat16),
}
_NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head_": "output",
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
_PARAMETER = re.compile(r"(?:layers\.(?P<layer>\d+)\.)?(?P<module>.+?)(?:\.base_layer_)?\.(?P<kind>weight|bias)")
_ROPE_FREQUENCIES = "rope_freqs.weight"
# Dequantizing takes several times this in temporaries, and they should stay in the processor's cache.
_BLOCK_VALUES = 1 << 16


class GgufCheckpoint:
    """An open GGUF file; see `moe_peft.io.checkpoint.Checkpoint`."""

    def __init__(self, file: GgufFile, data: np.ndarray) -> None:
        self.path = file.path
        self._file = file
        self._data = data
        num_values: Counter[torch.dtype] = Counter()
        for tensor in file.tensors.values():
            if tensor.type_name not in _TYPES:
                raise ValueError(
                    f"the tensor {tensor.name} has the type {tensor.type_name}, which is not supported: it must be one "
                    f"of {', '.join(_TYPES)}"
                )
            num_values[_TYPES[tensor.type_name]] += torch.Size(tensor.shape).numel()
        self.dtype = most_common_dtype(num_values)
        self.config = self._read_config()
        self.shapes = {name: tensor.shape for name, tensor in file.tensors.items() if name != _ROPE_FREQUENCIES}

    def name_of(self, parameter_name: str) -> str:
        """The file's name of one of our parameters."""
        match = _PARAMETER.fullmatch(parameter_name)
        assert match is not None, parameter_name
        name = f"{_NAMES[match['module']]}.{match['kind']}"
        return f"blk.{match['layer']}.{name}" if match["layer"] else name

    def copy_into(self, name: str, target: Tensor) -> None:
        """Dequantize into ``target`` block by block."""
        tensor = self._file.tensors[name]
        order = self._row_order(name, target.shape[0])
        for first, block in _row_blocks(tensor, self._data):
            rows = slice(first, first + block.shape[0])
            if order is None:
                target[rows].copy_(block)
            else:
                target[order[rows].to(target.device)] = block.to(target)

    def _read_config(self) -> LlamaConfig:
        config = read_gguf_config(self._file)
        if _ROPE_FREQUENCIES not in self._file.tensors:
            return config
        divisors = [block for _, block in _row_blocks(self._file.tensors[_ROPE_FREQUENCIES], self._data)]
        return with_baked_scaling(config, torch.cat(divisors).float())

    def _row_order(self, name: str, num_rows: int) -> Tensor | None:
        """Where each row belongs: llama.cpp pairs a head's features (2i, 2i+1) for RoPE, Hugging Face (i, i + d/2)."""
        num_heads = {
            "attn_q": self.config.num_attention_heads,
            "attn_k": self.config.num_kv_heads,
        }.get(name.rsplit(".", 2)[-2])
        if num_heads is None or self._file.metadata["general.architecture"] != "llama":
            return None
        # Position (head, pair, side) of the file is row (head, side, pair) of the model.
        return torch.arange(num_rows).view(num_heads, 2, -1).transpose(1, 2).reshape(-1)


@contextmanager
def open_gguf(path: Path) -> Iterator[GgufCheckpoint]:
    """Map a GGUF file and read its config.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is truncated or corrupted, one part of a split model, or an architecture, option or
            tensor type that is not supported.
    """
    file = read_gguf_header(path)
    parts = file.metadata.get("split.count", 0)
    if isinstance(parts, int) and parts > 1:
        raise ValueError(f"{path} is one of {parts} parts: join them with llama.cpp's `llama-gguf-split --merge`")
    # Copy-on-write only so that torch may look at it; nothing is ever written.
    data = np.memmap(path, dtype=np.uint8, mode="c")
    try:
        checkpoint = GgufCheckpoint(file, data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    yield checkpoint


def _row_blocks(tensor: GgufTensor, data: np.ndarray) -> Iterator[tuple[int, Tensor]]:
    """The tensor's rows a block at a time, with the first row's index; a vector's values count as rows."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    num_rows, row_shape = tensor.shape[0], tensor.shape[1:]
    raw = data[tensor.offset : tensor.offset + tensor.num_bytes].reshape(num_rows, -1)
    rows_per_block = max(1, _BLOCK_VALUES // max(1, torch.Size(row_shape).numel()))
    for first in range(0, num_rows, rows_per_block):
        block = raw[first : first + rows_per_block]
        if tensor.type_name in ("F32", "F16", "BF16"):
            values = torch.from_numpy(block.reshape(-1)).view(_TYPES[tensor.type_name])
        else:
            # As one long row: the dequantizer goes through 16 rows at a time, which is slow for short ones.
            values = torch.from_numpy(dequantize(block.reshape(1, -1), GGMLQuantizationType[tensor.type_name]))
        yield first, values.reshape(block.shape[0], *row_shape)
