"""The tensors that an adapter of some settings has on a base, without memory for any of them."""

import functools
import threading
from collections.abc import Mapping

import torch
from torch import Tensor

from moe_peft.adapters import Method
from moe_peft.io.base_model import BaseModelShape, without_memory
from moe_peft.model.config import LlamaConfig
from moe_peft.model.llama import LlamaForCausalLM

_NAME = "adapter"
_lock = threading.Lock()  # one adapter at a time on the twin


def state_on_meta(model: LlamaForCausalLM, config: Method) -> Mapping[str, Tensor]:
    """Weights and saved buffers of a fresh adapter by checkpoint name, on the meta device.

    Args:
        model: the base; nothing is attached to it.
        config: the adapter's.

    Raises:
        ValueError: when the settings do not fit the model.
    """
    # Patterns in another order are equal as dictionaries, but mean something else: the text tells them apart.
    return _state(model.config_, model.dtype, config, repr(config))


@functools.lru_cache(maxsize=16)  # adapters that are loaded in turns mostly have the same settings
def _state(base: LlamaConfig, dtype: torch.dtype, config: Method, text: str) -> Mapping[str, Tensor]:
    with _lock:
        twin = _twin(base, dtype)
        with without_memory():
            twin.add_adapter(_NAME, config)
        try:
            return {**twin.adapter_state(_NAME), **dict(config.saved_buffers(twin, _NAME))}
        finally:
            twin.remove_adapter(_NAME)


@functools.lru_cache(maxsize=1)
def _twin(base: LlamaConfig, dtype: torch.dtype) -> LlamaForCausalLM:
    """A model of that shape."""
    return BaseModelShape(base, dtype, torch.device("meta")).empty_model()
