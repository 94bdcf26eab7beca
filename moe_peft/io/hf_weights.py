"""The safetensors files of a Hugging Face model folder, memory-mapped."""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from moe_peft.io.checkpoint import most_common_dtype
from moe_peft.io.hf_config import read_llama_config
from moe_peft.io.json_file import read_json_object
from moe_peft.model.config import LlamaConfig

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_EMBEDDING, _HEAD = "embed_tokens.weight", "lm_head.weight"


class HfCheckpoint:
    """An open Hugging Face folder; see `moe_peft.io.checkpoint.Checkpoint`."""

    def __init__(self, path: Path, config: LlamaConfig, files: dict[str, Any]) -> None:
        self.path = path
        self.config = config
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._file_of: dict[str, Any] = {}
        num_values: Counter[torch.dtype] = Counter()
        for file_name, file in files.items():
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                if name in self._file_of:
                    raise ValueError(f"{path}: the tensor {name} stands in {file_name} and in another file")
                self._file_of[name] = file
                if name.endswith("rotary_emb.inv_freq"):
                    continue  # old checkpoints keep what the config says anyway
                header = file.get_slice(name)
                if header.get_dtype() not in _DTYPES:
                    raise ValueError(
                        f"{path / file_name}: the tensor {name} has dtype {header.get_dtype()}; it must be one of "
                        f"{', '.join(_DTYPES)} (quantized weights are not supported)"
                    )
                self.shapes[name] = tuple(header.get_shape())
                num_values[_DTYPES[header.get_dtype()]] += torch.Size(self.shapes[name]).numel()
        self.dtype = most_common_dtype(num_values)
        # A checkpoint of the bare decoder has no prefix.
        self._prefix = "" if _EMBEDDING in self.shapes else "model."
        if config.tie_word_embeddings and _HEAD in self.shapes:
            self._drop_repeated_head()

    def name_of(self, parameter_name: str) -> str:
        """The file's name of one of our parameters."""
        if parameter_name.startswith("lm_head_."):
            return parameter_name.replace("lm_head_.", "lm_head.", 1)
        return self._prefix + parameter_name.replace(".base_layer_.", ".")

    def copy_into(self, name: str, target: Tensor) -> None:
        """Fill ``target`` from the map: a file that changes afterwards changes nothing here."""
        target.copy_(self._file_of[name].get_tensor(name))

    def _drop_repeated_head(self) -> None:
        """A tied model's file may repeat the embedding as its head, but not contradict it."""
        embedding = self._prefix + _EMBEDDING
        if embedding in self.shapes:
            head = self._file_of[_HEAD].get_tensor(_HEAD)
            table = self._file_of[embedding].get_tensor(embedding)
            if head.dtype != table.dtype or not torch.equal(head, table):
                raise ValueError(
                    f"{self.path}: {_HEAD} differs from {embedding}, but config.json says tie_word_embeddings=true; "
                    "set it to false to use both"
                )
        del self.shapes[_HEAD]


@contextmanager
def open_hf_folder(folder: Path) -> Iterator[HfCheckpoint]:
    """Read the config and map the weights; the maps are closed at the end of the block.

    Raises:
        FileNotFoundError: the folder has no config.json, or no weights.
        ValueError: a config that is not supported, weights that are not safetensors, a shard that is missing, cut off
            or corrupted, or an index that does not fit its shards.
    """
    from safetensors import SafetensorError, safe_open

    config = read_llama_config(folder)
    file_names, index = _weight_files(folder)
    with ExitStack() as stack:
        files = {}
        for name in file_names:
            try:
                files[name] = stack.enter_context(safe_open(str(folder / name), framework="pt"))
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"the safetensors file {folder / name} is truncated or corrupted: {error}; download it again"
                ) from error
        for tensor_name, file_name in index.items():
            if tensor_name not in files[file_name].keys():  # noqa: SIM118 (not a mapping)
                raise ValueError(f"{folder / _INDEX} says that {tensor_name} is in {file_name}, but it is not")
        yield HfCheckpoint(folder, config, files)


def _weight_files(folder: Path) -> tuple[list[str], dict[str, str]]:
    """The names of the files with weights, and which of them has which tensor where an index says so."""
    if (folder / _SINGLE).is_file():
        return [_SINGLE], {}
    if (folder / _INDEX).is_file():
        index = _read_index(folder / _INDEX)
        names = sorted(set(index.values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{folder} lacks {len(missing)} of {len(names)} shards: {', '.join(missing[:4])}")
        return names, index
    if pickles := [
        *sorted(folder.glob("pytorch_model*")),
        *sorted(folder.glob("*.bin")),
        *sorted(folder.glob("*.pt*")),
    ]:
        raise ValueError(
            f"{folder} has its weights in {pickles[0].name}, a pickle, which may run code and is never opened here: "
            "save the model as safetensors (in transformers: model.save_pretrained(folder)) and use that folder"
        )
    raise FileNotFoundError(f"{folder} has no {_SINGLE} and no {_INDEX}")


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path} must have a weight_map object that names the shard of each tensor")
    for tensor_name, file_name in weight_map.items():
        if not isinstance(file_name, str) or PurePath(file_name).name != file_name:
            raise ValueError(f"{path}: the shard of {tensor_name} is {file_name!r}; it must be a file name")
        if not file_name.endswith(".safetensors"):
            raise ValueError(f"{path}: the shard of {tensor_name} is {file_name!r}; it must be a .safetensors file")
    return weight_map
