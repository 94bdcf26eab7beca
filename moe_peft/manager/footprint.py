"""How large an adapter is in memory, and whether it is still what was saved.

The size of one that is not in memory is counted on a model on the meta device.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch

from moe_peft.adapters import Method
from moe_peft.io.base_model import BaseModelShape, without_memory
from moe_peft.model.batch import parse_expert_name
from moe_peft.model.linear import AdapterDict
from moe_peft.model.llama import LlamaForCausalLM

_NAME = "adapter"


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
    tensors: dict[int, torch.Tensor] = {id(buffer): buffer for buffer in model.adapter_buffers(name).values()}
    for adapters in (module for module in model.modules() if isinstance(module, AdapterDict)):
        for key, module in adapters.items():
            expert = parse_expert_name(key)
            if name in (key, expert and expert[0]):
                tensors |= {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    weights = model.adapter_parameters(name)
    tensors |= {id(weight): weight for weight in weights}
    return Footprint(sum(weight.numel() for weight in weights), sum(tensor.nbytes for tensor in tensors.values()))


class Twin:
    """A model of another one's shape without memory, on which adapters are measured before they are loaded.

    Args:
        model: whose shape it has.
    """

    def __init__(self, model: LlamaForCausalLM) -> None:
        self._twin = BaseModelShape(model.config_, model.dtype, model.device).empty_model()

    def footprint(self, config: Method, tokenizer: Any = None) -> Footprint:
        """Of an adapter that is not attached.

        Raises:
            ValueError: when the config does not fit the model.
        """
        with without_memory():
            self._twin.add_adapter(_NAME, config, tokenizer=tokenizer)
        found = footprint_of(self._twin, _NAME)
        self._twin.remove_adapter(_NAME)
        return found


def digest_of(model: LlamaForCausalLM, name: str) -> bytes:
    """Of all that ``save_adapter`` would write, so that any change shows, however it was made."""
    config = model.adapter_config(name)
    digest = hashlib.blake2b(json.dumps(config.to_peft(model, name), default=str).encode(), digest_size=16)
    for key, tensor in config.to_saved(model, name).items():
        digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.digest()
