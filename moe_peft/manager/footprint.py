"""How large an adapter is in memory, and whether it is still what was saved.

The size of one that is not in memory is counted on a model on the meta device.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moe_peft.adapters import Method
from moe_peft.io.base_model import BaseModelShape, without_memory
from moe_peft.model.batch import parse_expert_name
from moe_peft.model.linear import AdapterDict
from moe_peft.model.llama import LlamaForCausalLM

Tensors = dict[int, torch.Tensor]  # by id, so that what adapters share is in it once
_MEASURED, _KEPT = "measured", "kept-"  # names on the twin, which never meet: the second begins a longer one


@dataclass(frozen=True)
class Footprint:
    """An adapter's size.

    Args:
        num_parameters: that are trained.
        num_bytes: of all its tensors in memory.
    """

    num_parameters: int
    num_bytes: int


def footprint_of(model: LlamaForCausalLM, name: str) -> Footprint:
    """Of an adapter that is attached."""
    num_parameters = sum(weight.numel() for weight in model.adapter_parameters(name))
    return Footprint(num_parameters, num_bytes_of([tensors_of(model, name)]))


def num_bytes_of(tensors: Iterable[Tensors]) -> int:
    """Of all together."""
    union = {key: tensor.nbytes for of_one in tensors for key, tensor in of_one.items()}
    return sum(union.values())


def tensors_of(model: LlamaForCausalLM, name: str) -> Tensors:
    """All that an adapter has in memory."""
    tensors: Tensors = {id(buffer): buffer for buffer in model.adapter_buffers(name).values()}
    for adapters in (module for module in model.modules() if isinstance(module, AdapterDict)):
        for key, module in adapters.items():
            expert = parse_expert_name(key)
            if name in (key, expert and expert[0]):
                tensors |= {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return tensors | {id(weight): weight for weight in model.adapter_parameters(name)}


class Twin:
    """A model of another one's shape without memory, on which adapters are measured before they are loaded.

    Args:
        model: whose shape it has.
    """

    def __init__(self, model: LlamaForCausalLM) -> None:
        self._twin = BaseModelShape(model.config_, model.dtype, model.device).empty_model()
        self._kept: dict[str, tuple[Method, Tensors]] = {}

    def footprint(self, config: Method, tokenizer: Any = None) -> Footprint:
        """Of an adapter that is not attached.

        Raises:
            ValueError: when the config does not fit the model.
        """
        with without_memory():
            self._twin.add_adapter(_MEASURED, config, tokenizer=tokenizer)
        try:
            return footprint_of(self._twin, _MEASURED)
        finally:
            self._twin.remove_adapter(_MEASURED)

    def tensors(self, configs: Mapping[str, Method], tokenizer: Any = None) -> dict[str, Tensors]:
        """Of adapters beside each other, by name: what they would share is one tensor.

        They stay on the twin, as most of them are asked for again.

        Raises:
            ValueError: when a config does not fit the model.
        """
        for name in [name for name, (config, _) in self._kept.items() if configs.get(name) != config]:
            self._twin.remove_adapter(_KEPT + name)
            del self._kept[name]
        for name, config in configs.items():
            if name not in self._kept:
                with without_memory():
                    self._twin.add_adapter(_KEPT + name, config, tokenizer=tokenizer)
                self._kept[name] = config, tensors_of(self._twin, _KEPT + name)
        return {name: self._kept[name][1] for name in configs}


class Room:
    """The bytes that adapters take together: what several of them share counts once.

    Args:
        model: carries some.
        twin: of the model.
        residents: those on the model, by name.
        incoming: those that are to join them.
        tokenizer: for methods that start from a text.

    Raises:
        ValueError: when a config does not fit the model.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        twin: Twin,
        residents: Iterable[str],
        incoming: Mapping[str, Method],
        tokenizer: Any = None,
    ) -> None:
        self._here = {name: tensors_of(model, name) for name in residents}
        configs = {name: model.adapter_config(name) for name in self._here} if incoming else {}
        self._on_twin = twin.tensors({**configs, **incoming}, tokenizer)
        self._incoming = tuple(incoming)

    def num_bytes(self, residents: Collection[str]) -> int:
        """With so many of the residents left, and all that join them."""
        together = num_bytes_of(self._on_twin[name] for name in (*residents, *self._incoming) if name in self._on_twin)
        without = num_bytes_of(self._on_twin[name] for name in residents if name in self._on_twin)
        # On the model a resident may have grown since: the twin tells only what others add to it.
        return num_bytes_of(self._here[name] for name in residents) + together - without


def digest_of(model: LlamaForCausalLM, name: str) -> bytes:
    """Of all that ``save_adapter`` would write, so that any change shows, however it was made."""
    config = model.adapter_config(name)
    digest = hashlib.blake2b(json.dumps(config.to_peft(model, name), default=str).encode(), digest_size=16)
    for key, tensor in config.to_saved(model, name).items():
        digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.digest()
