"""Adapter folders, as PEFT lays them out: ``adapter_config.json`` beside ``adapter_model.safetensors``."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_peft.adapters import METHODS, Method
from moe_peft.io.adapter_twin import state_on_meta
from moe_peft.io.atomic import atomic_folder, safetensors_size, save_safetensors_atomically, write_text_atomically
from moe_peft.io.json_file import read_json_object
from moe_peft.io.original_adapter import (
    PICKLED_WEIGHTS_FILE,
    is_original_config,
    read_pickled_weights,
    translate_adapter_config,
)
from moe_peft.model.llama import LlamaForCausalLM
from moe_peft.strict import build, check_keys, did_you_mean

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_METADATA = {"format": "pt"}

# Two numbers in each element: torch converts none of them.
_UNREADABLE = {getattr(torch, "float4_e2m1fn_x2", None)}

# What PEFT writes about a folder that changes nothing about its weights' meaning.
_INFORMATIVE = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "layers_pattern",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}


def save_adapter(model: LlamaForCausalLM, name: str, folder: str | Path) -> None:
    """Write an adapter as PEFT would, so that ``load_adapter`` and (for LoRA) ``peft`` itself read it.

    Args:
        model: the model that carries it.
        name: the adapter.
        folder: made, or replaced when it holds an adapter already. A crash leaves the old folder or the new one.

    Raises:
        ValueError: on an unknown adapter, or a folder that holds other files, which replacing would delete.
    """
    model.adapter_config(name)  # refuses an unknown one before the folder is looked at
    target = Path(folder)
    if target.is_dir():
        foreign = sorted(path.name for path in target.iterdir() if path.name not in (CONFIG_FILE, WEIGHTS_FILE))
        if foreign:
            raise ValueError(
                f"folder {target} holds {foreign[0]!r}: an adapter's folder may hold nothing but the adapter"
            )
    elif target.exists():
        raise ValueError(f"folder {target} is a file")
    text, state = _contents(model, name)
    with atomic_folder(target, replace=True) as partial:
        # Experts' tensors are views of one stack, which safetensors would refuse as shared memory.
        tensors = {key: tensor.clone() for key, tensor in state.items()}
        save_safetensors_atomically(partial / WEIGHTS_FILE, tensors, _METADATA)
        write_text_atomically(partial / CONFIG_FILE, text)


def _contents(model: LlamaForCausalLM, name: str) -> tuple[str, dict[str, Tensor]]:
    """The text of an adapter's config file, and its tensors."""
    config = model.adapter_config(name)
    fields = {
        "peft_type": config.peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.source_ or None,
        "inference_mode": True,
        **config.to_peft(model, name),
    }
    return json.dumps(fields, indent=2) + "\n", config.to_saved(model, name)


def size_of_files(model: LlamaForCausalLM, name: str) -> int:
    """Bytes of the files that ``save_adapter`` would write; the adapter may be on the meta device."""
    text, tensors = _contents(model, name)
    return len(text.encode()) + safetensors_size(tensors, _METADATA)


def load_adapter(
    model: LlamaForCausalLM,
    folder: str | Path,
    name: str | None = None,
    *,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
) -> str:
    """Attach an adapter from its folder.

    Args:
        model: the base it was trained on.
        folder: as ``save_adapter``, PEFT or the original MoE-PEFT wrote it.
        name: under which it is attached; None takes the folder's name.
        seed: of its dropout when it is trained on.
        settings: fields of its config that are to have other values than the folder gives them, such as
            ``{"lora_dropout": 0.1}``, or ``{"active_levels": [0, 2]}`` for a part of a hierarchical LoRA.

    Returns:
        The name.

    Raises:
        ValueError: on missing, damaged or unsupported files, settings that its method does not have, or weights that do
            not fit this base or are not finite. Nothing is attached.
    """
    path = Path(folder)
    name = path.resolve().name if name is None else name
    config = read_adapter_config(path, settings)
    file = _weights_file(path)
    with torch.inference_mode(False):  # whose tensors could never be trained
        weights = read_pickled_weights(file) if file.name == PICKLED_WEIGHTS_FILE else _read_safetensors(file)
        # Before anything is allocated: a config may ask for far more than the file holds.
        weights = _checked(weights, config, state_on_meta(model, config), file)
        model.add_adapter(name, config, seed=seed)
        try:
            with torch.no_grad():
                for key, tensor in model.adapter_state(name).items():
                    tensor.copy_(weights[key])
                config.restore_buffers(model, name, weights)
        except BaseException:
            model.remove_adapter(name)
            raise
    return name


def read_adapter_config(folder: str | Path, settings: Mapping[str, Any] | None = None) -> Method:
    """The method's settings in an adapter folder.

    Args:
        settings: values in place of the folder's own.

    Raises:
        ValueError: when the file is missing, broken, or asks for what no method here does, or the method has no such
            settings.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.parent.is_dir():
        raise ValueError(f"there is no adapter folder {folder}")
    if not path.is_file():
        raise ValueError(f"{folder} has no {CONFIG_FILE}: an adapter folder holds it beside {WEIGHTS_FILE}")
    data = read_json_object(path)
    by_type: dict[str, list[type[Method]]] = {}
    for method in METHODS.values():
        by_type.setdefault(method.peft_type, []).append(method)
    kind = str(data.get("peft_type", ""))
    if kind not in by_type:
        close = did_you_mean(kind, by_type)
        raise ValueError(f"{path}: peft_type={data.get('peft_type')!r} must be one of {', '.join(by_type)}{close}")
    try:
        if is_original_config(data):
            data = translate_adapter_config(data)
        # The most derived of those that claim it; what none claims is refused by name, as no setting of the first.
        claiming = [method for method in by_type[kind] if method.claims(data)]
        method = max(claiming, key=lambda method: len(method.mro()), default=by_type[kind][0])
        return _build_config(method, data, settings or {})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def num_values_in(folder: str | Path) -> int:
    """How many numbers an adapter's weights file holds.

    Raises:
        ValueError: when the file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    file = _weights_file(Path(folder))
    if file.name == PICKLED_WEIGHTS_FILE:
        return sum(tensor.numel() for tensor in read_pickled_weights(file).values())
    try:
        with safe_open(file, framework="pt") as opened:
            return sum(math.prod(opened.get_slice(key).get_shape()) for key in opened.keys())  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is truncated or corrupted: {error}") from error


def _build_config(method: type[Method], data: dict[str, Any], settings: Mapping[str, Any]) -> Method:
    data = method.from_peft(data)
    names = {field.name for field in dataclasses.fields(method)}
    for key, value in data.items():
        # By identity: layers_to_transform=0 is a layer, although 0 == False.
        neutral = value is None or value is False or value in ("none", {}, [])
        if key not in names and key not in _INFORMATIVE and not neutral:
            raise ValueError(f"{key}={value!r} changes the adapter and is not supported for {method.peft_type}")
    own = {key: data[key] for key in names if key in data}
    return build(method, {**own, **check_keys(settings, names, "settings")})


def _weights_file(folder: Path) -> Path:
    for name in (WEIGHTS_FILE, PICKLED_WEIGHTS_FILE):
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{folder} has no {WEIGHTS_FILE}, nor an {PICKLED_WEIGHTS_FILE} of older tools")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is truncated or corrupted: {error}") from error


def _checked(weights: dict[str, Tensor], config: Method, state: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """A file's tensors under the names, and of the shapes, of ``state``."""
    for key, tensor in weights.items():
        if tensor.is_complex() or tensor.dtype in _UNREADABLE:
            raise ValueError(f"{file}: {key} holds {tensor.dtype}, not floating-point weights")
    try:
        weights = config.from_saved(weights)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    missing, unexpected = sorted(state.keys() - weights.keys()), sorted(weights.keys() - state.keys())
    if missing or unexpected:
        what = f"lacks {missing[0]}" if missing else f"has {unexpected[0]}"
        raise ValueError(
            f"{file} {what}, unlike an adapter of this config on this base "
            f"({len(missing)} missing, {len(unexpected)} unexpected tensors): was it trained on another base?"
        )
    for key, tensor in state.items():
        if tensor.shape != weights[key].shape:
            raise ValueError(
                f"{file}: {key} has shape {list(weights[key].shape)}, but this base needs "
                f"{list(tensor.shape)}: it was trained on another base"
            )
        if weights[key].is_floating_point() != tensor.is_floating_point():
            kind = "floating-point weights" if tensor.is_floating_point() else f"{tensor.dtype}"
            raise ValueError(f"{file}: {key} holds {weights[key].dtype}, not {kind}")
        if not weights[key].to(tensor.dtype).isfinite().all():
            raise ValueError(f"{file}: {key} must be finite, but holds NaN, or numbers beyond {tensor.dtype}")
    return weights
