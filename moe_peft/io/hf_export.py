"""A Hugging Face model folder written from a model here, an adapter merged into its weights on the way."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_peft.data.tokenizer import load_tokenizer
from moe_peft.data.tokenizer_files import tokenizer_files
from moe_peft.io.adapter_files import CONFIG_FILE
from moe_peft.io.atomic import atomic_folder, check_free, write_text_atomically
from moe_peft.io.base_model import without_memory
from moe_peft.io.hf_config import llama_config_from_dict
from moe_peft.io.hf_config_fields import architecture, dtype_name, hf_config_fields, normalized
from moe_peft.io.json_file import read_json_object
from moe_peft.io.placement import AUTO, parse_dtype
from moe_peft.io.safetensors_stream import TensorPlan, write_safetensors
from moe_peft.io.source import resolve_source
from moe_peft.model.config import LlamaConfig
from moe_peft.model.linear import Linear
from moe_peft.model.llama import LlamaForCausalLM
from moe_peft.model.merging import check_mergeable, merged_base
from moe_peft.strict import show

DEFAULT_SHARD_SIZE = "5GB"

# What a Hugging Face folder keeps beside its weights and its config.
_GENERATION_FILE = "generation_config.json"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
)
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}

OnTensor = Callable[[str, int], object]


def save_merged_model(
    model: LlamaForCausalLM,
    name: str,
    folder: str | Path,
    *,
    source: str | Path | None = None,
    with_tokenizer: bool = True,
    dtype: str | torch.dtype | None = None,
    max_shard_size: str | int = DEFAULT_SHARD_SIZE,
) -> None:
    """Write the model with an adapter merged into it as a folder for ``transformers``, vLLM and ``load_base_model``.

    The model itself stays as it is. One tensor at a time is merged, written and let go.

    Args:
        model: carries the adapter.
        name: the adapter; ``""`` writes the base weights as they stand.
        folder: made; it must not exist, or be empty. A crash leaves nothing.
        source: what the model was loaded from, whose tokenizer and generation settings come along; None: neither.
        with_tokenizer: whether the source's tokenizer does.
        dtype: of the written weights, a torch dtype or its name, rounded once from the sum; None: the model's.
        max_shard_size: of a weights file, such as ``5GB`` or a number of bytes.

    Raises:
        FileExistsError: the folder exists and holds something.
        ValueError: on an adapter that cannot be merged, or cannot run now; a model that no Hugging Face model type
            describes; a tokenizer that cannot be written; a bad ``dtype`` or ``max_shard_size``; or a folder that
            nobody could make, or inside an adapter's or the source's.
    """
    check_output(folder, source)
    export = HfExport(
        model, name, source=source, with_tokenizer=with_tokenizer, dtype=dtype, max_shard_size=max_shard_size
    )
    export.write(folder)


class HfExport:
    """What ``save_merged_model`` is about to write; the constructor refuses what it cannot."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        name: str,
        *,
        source: str | Path | None = None,
        with_tokenizer: bool = True,
        dtype: str | torch.dtype | None = None,
        max_shard_size: str | int = DEFAULT_SHARD_SIZE,
    ) -> None:
        if name != "":
            model.check_runnable(name)
            if model.merged_adapter is None:
                check_mergeable(model, name)
        self._model, self._name = model, name
        self._dtype = parse_dtype(AUTO if dtype is None else dtype) or model.dtype
        self._shards = _shards(model, self._dtype, parse_size(max_shard_size))
        self._texts, self._files = _companions(model.config_, self._dtype, source, with_tokenizer)
        self.num_files = len(self._shards)
        self.num_bytes = sum(plan.num_bytes for shard in self._shards.values() for plan, _ in shard)

    def write(self, folder: str | Path, on_tensor: OnTensor | None = None) -> None:
        """Make the folder.

        Args:
            folder: as in ``save_merged_model``.
            on_tensor: called with each tensor's name before it is written, and the bytes written so far.
        """
        done = 0

        def tensors(shard: Sequence[tuple[TensorPlan, str]]) -> Iterator[Tensor]:
            nonlocal done
            merged = _merged_tensors(self._model, self._name, self._dtype, [parameter for _, parameter in shard])
            for plan, _ in shard:
                if on_tensor is not None:
                    on_tensor(plan.name, done)
                yield next(merged)
                done += plan.num_bytes

        with atomic_folder(folder) as partial:
            for file_name, shard in self._shards.items():
                write_safetensors(partial / file_name, [plan for plan, _ in shard], tensors(shard), {"format": "pt"})
            if self.num_files > 1:
                weight_map = {plan.name: file_name for file_name, shard in self._shards.items() for plan, _ in shard}
                index = {"metadata": {"total_size": self.num_bytes}, "weight_map": weight_map}
                write_text_atomically(partial / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
            for path in self._files:
                shutil.copyfile(path, partial / path.name)
            for file_name, text in self._texts.items():
                write_text_atomically(partial / file_name, text)


def check_output(folder: str | Path, source: str | Path | None) -> None:
    """Refuse a folder that could not be made, or that would make an adapter's or the source's one of another kind.

    Raises:
        FileExistsError: it is a file, or holds something.
        NotADirectoryError: it would lie below a file.
        ValueError: nobody could make it, or it lies inside such a folder.
    """
    check_free(folder)
    target = Path(os.path.realpath(folder))
    base = None if source is None else Path(os.path.realpath(Path(source).expanduser()))
    for parent in target.parents:
        if (parent / CONFIG_FILE).is_file():
            raise ValueError(f"the folder {folder} must not lie inside an adapter's, which {parent} is")
        if parent == base:
            raise ValueError(f"the folder {folder} must not lie inside the base model's, which {parent} is")


def parse_size(size: str | int) -> int:
    """Bytes, from their number or such as ``5GB``, ``500MB`` and ``2GiB``.

    Raises:
        ValueError: when it is no size above 0, or none that a file can have.
    """
    match = _SIZE.fullmatch(str(size).strip())
    number = 0.0
    if match is not None:
        number = float(match[1]) * (1024 if match[3] else 1000) ** _POWERS[match[2].lower()]
    if not 1 <= number < 2**63:
        raise ValueError(
            f"max_shard_size={show(size)} must be a number of bytes above 0 and below 2**63, such as 5GB or 500MB"
        )
    return int(number)


def _companions(
    config: LlamaConfig, dtype: torch.dtype, source: str | Path | None, with_tokenizer: bool
) -> tuple[dict[str, str], list[Path]]:
    """What the folder holds beside the weights: files' names with their texts, and files to be copied."""
    path = None if source is None else resolve_source(source)
    texts: dict[str, str] = {}
    files: list[Path] = []
    if path is not None and path.is_dir():
        fields = _source_fields(path, config)
        names = (_GENERATION_FILE, *(_TOKENIZER_FILES if with_tokenizer else ()))
        files = [path / name for name in names if (path / name).is_file()]
    else:
        fields = hf_config_fields(config)
        if path is not None and with_tokenizer:
            try:
                tokenizer = load_tokenizer(path)
                texts = tokenizer_files(tokenizer)
            except ValueError as error:
                raise ValueError(f"{error}; with_tokenizer=False (--no-tokenizer) leaves it out") from error
            ends = list(tokenizer.eos_token_ids)
            fields |= {
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
                "pad_token_id": tokenizer.pad_token_id,
            }
    spelling = "dtype" if "dtype" in fields else "torch_dtype"  # that of transformers 5, or one that all know
    texts["config.json"] = json.dumps({**fields, spelling: dtype_name(dtype)}, indent=2) + "\n"
    return texts, files


def _source_fields(folder: Path, config: LlamaConfig) -> dict[str, Any]:
    """The source's own config, which says more than ours, where it says the same of the model."""
    fields = read_json_object(folder / "config.json")
    if normalized(llama_config_from_dict(fields)) != normalized(config):
        raise ValueError(f"{folder / 'config.json'} describes another model than the one to be written")
    return {**fields, "architectures": [architecture(str(fields["model_type"]))]}


def _shards(model: LlamaForCausalLM, dtype: torch.dtype, max_bytes: int) -> dict[str, list[tuple[TensorPlan, str]]]:
    """Names of files, each with its tensors and the parameters they are made of; a tensor above the size is alone."""
    with without_memory():
        base = LlamaForCausalLM(model.config_)  # which has no adapters among its parameters
    groups: list[list[tuple[TensorPlan, str]]] = [[]]
    size = 0
    for parameter, value in base.named_parameters():
        plan = TensorPlan(name=_hf_name(parameter), shape=tuple(value.shape), dtype=dtype)
        if groups[-1] and size + plan.num_bytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append((plan, parameter))
        size += plan.num_bytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, start=1)}


def _hf_name(parameter: str) -> str:
    if parameter.startswith("lm_head_."):
        return parameter.replace("lm_head_.", "lm_head.", 1)
    return "model." + parameter.replace(".base_layer_.", ".")


def _merged_tensors(
    model: LlamaForCausalLM, name: str, dtype: torch.dtype, parameters: Sequence[str]
) -> Iterator[Tensor]:
    path, pair = "", (torch.empty(0), None)  # type: tuple[str, tuple[Tensor, Tensor | None]]
    for parameter in parameters:
        owner, _, kind = parameter.rpartition(".")
        own_path = owner.removesuffix(".base_layer_")
        linear = model.get_submodule(own_path)
        if model.merged_adapter is None and isinstance(linear, Linear) and name in linear.loras_:
            if own_path != path:
                path, pair = own_path, merged_base(linear, name, own_path, dtype)
            part = pair[0] if kind == "weight" else pair[1]
            assert part is not None
            yield part
        else:
            yield model.get_parameter(parameter).detach().to(dtype)
