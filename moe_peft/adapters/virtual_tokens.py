"""What the methods that put virtual tokens before every sample of an adapter have in common.

PEFT's folder holds these tokens as they come out of an encoder, if there is one, and not the encoder: a folder gives an
adapter whose virtual tokens are parameters themselves. A run's checkpoints hold the encoder.

Letters: V virtual tokens, I input features, O output features.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moe_peft.adapters.method import Method, NamedWeight, check_size
from moe_peft.model.draws import generator_for
from moe_peft.model.linear import AdapterDict, wide_dtype

if TYPE_CHECKING:
    from moe_peft.model.llama import LlamaForCausalLM

PROMPT_EMBEDDINGS = "prompt_embeddings"
# Fields of PEFT's that follow from the base model, or say how weights began that the folder holds.
_FOLLOWING = ("token_dim", "num_attention_heads", "num_layers", "inference_mode")


@dataclass(frozen=True, kw_only=True)
class VirtualTokenMethod(Method):
    """Settings of an adapter of virtual tokens.

    Raises:
        ValueError: on a value outside its rule.
    """

    num_virtual_tokens: int = field(default=20, metadata={"help": "virtual tokens before each sample"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_size("num_virtual_tokens", self.num_virtual_tokens)

    @property
    def context_tokens(self) -> int:
        """V."""
        return self.num_virtual_tokens

    @property
    def takes_lr_ratio(self) -> bool:
        """Not the virtual tokens themselves: they are one table."""
        return False

    @property
    def inserted_tokens(self) -> int:
        """V."""
        return self.num_virtual_tokens

    def check_room(self, model: "LlamaForCausalLM") -> None:
        """Refuses more virtual tokens than leave a sample its two tokens, without which it can teach nothing.

        Raises:
            ValueError: naming the field.
        """
        limit = model.config_.context_limit
        if limit is not None and self.num_virtual_tokens > limit - 2:
            raise ValueError(
                f"num_virtual_tokens={self.num_virtual_tokens} must be at most {limit - 2} on this base model, which "
                f"is made for {limit} tokens: a sample takes at least two of them"
            )

    def held_in(self, model: "LlamaForCausalLM") -> AdapterDict:
        """Where in the model the virtual tokens are: a module a name, which gives them when it is called."""
        return model.prompts_

    @abstractmethod
    def peft_shape(self, model: "LlamaForCausalLM") -> dict[str, int]:
        """``token_dim`` and ``num_attention_heads`` as PEFT has them for this method."""

    def named_weights(self, model: "LlamaForCausalLM", name: str) -> Iterator[NamedWeight]:
        """``prompt_embeddings``, or the weights of the encoder under PEFT's names."""
        for key, weight in self.held_in(model)[name].named_parameters():
            yield key, weight, None

    @classmethod
    def from_peft(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        """Without what follows from the base model; the files' shapes show whether it does."""
        if data.get("num_transformer_submodules") not in (None, 1):
            raise ValueError(
                f"num_transformer_submodules={data['num_transformer_submodules']!r} must be 1: this base is a decoder"
            )
        left_out = {"num_transformer_submodules", *_FOLLOWING}
        return {key: value for key, value in data.items() if key not in left_out}

    def to_peft(self, model: "LlamaForCausalLM", name: str) -> dict[str, Any]:
        """With what PEFT notes of the base model."""
        following = {"num_layers": model.config_.num_hidden_layers, "num_transformer_submodules": 1}
        return {**super().to_peft(model, name), **following, **self.peft_shape(model), "inference_mode": True}

    def to_saved(self, model: "LlamaForCausalLM", name: str) -> dict[str, Tensor]:
        """The virtual tokens themselves."""
        return {PROMPT_EMBEDDINGS: self.held_in(model)[name]().detach()}


def check_encoder_size(encoder_hidden_size: int | None) -> None:
    """Refuses a width that no encoder has.

    Raises:
        ValueError: naming the field.
    """
    if encoder_hidden_size is None:
        return
    if encoder_hidden_size < 1:
        raise ValueError(f"encoder_hidden_size={encoder_hidden_size} must be at least 1, or null")
    check_size("encoder_hidden_size", encoder_hidden_size)


class Draws:
    """Initial values of one adapter, drawn on the CPU from its own seed.

    Args:
        model: whose dtype and device the values are for.
        name: the adapter's.
        seed: the adapter's.
    """

    def __init__(self, model: "LlamaForCausalLM", name: str, seed: int) -> None:
        self._key = (seed, name, "init")
        self._dtype, self._device = wide_dtype(model.dtype), model.device

    def generator(self, what: str) -> torch.Generator:
        """The stream of one tensor."""
        return generator_for(*self._key, what)

    def normal(self, what: str, *shape: int) -> Tensor:
        """Standard normal, as torch gives ``nn.Embedding``."""
        values = torch.empty(*shape, dtype=self._dtype).normal_(generator=self.generator(what))
        return values.to(self._device)

    def uniform(self, what: str, bound: float, *shape: int) -> Tensor:
        """Uniform in ``-bound..bound``."""
        values = torch.empty(*shape, dtype=self._dtype).uniform_(-bound, bound, generator=self.generator(what))
        return values.to(self._device)

    def dense(self, what: str, in_features: int, out_features: int) -> "Dense":
        """A layer as torch begins ``nn.Linear``."""
        bound = 1 / math.sqrt(in_features)
        weight = self.uniform(f"{what}.weight", bound, out_features, in_features)
        return Dense(weight, self.uniform(f"{what}.bias", bound, out_features))


class Dense(nn.Module):
    """``y = W x + b`` with given initial values: ``nn.Linear`` would draw its own from the global state.

    Args:
        weight: ``[O, I]``.
        bias: ``[O]``.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[V, I]`` to ``[V, O]``."""
        return nn.functional.linear(x, self.weight, self.bias)


class Embedding(nn.Module):
    """A table ``[V, D]`` that is read as a whole."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
