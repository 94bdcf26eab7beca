"""Bottleneck adapters: small networks behind a layer's sublayers (https://arxiv.org/abs/1902.00751).

Letters: n tokens of one adapter, D model, H bottleneck.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from moe_peft import ops, strict
from moe_peft.adapters.activations import ACTIVATIONS
from moe_peft.adapters.method import Method, NamedWeight, check_size
from moe_peft.model.batch import Segment
from moe_peft.model.draws import generator_for
from moe_peft.model.forward import ForwardBatch
from moe_peft.model.linear import AdapterDict, wide_dtype

if TYPE_CHECKING:
    from moe_peft.model.llama import LlamaForCausalLM

# Where an adapter sits in a layer; "pfeiffer" is https://arxiv.org/abs/2005.00247.
PLACEMENTS = {"houlsby": ("self_attn", "mlp"), "pfeiffer": ("mlp",)}


@dataclass(frozen=True, kw_only=True)
class BottleneckConfig(Method):
    """Settings of a bottleneck adapter.

    Raises:
        ValueError: on a value outside its rule.
    """

    placement: Literal["houlsby", "pfeiffer"] = field(
        default="houlsby",
        metadata={"help": "houlsby: behind attention and behind the feed-forward layer; pfeiffer: behind the latter"},
    )
    bottleneck_size: int = field(default=64, metadata={"help": "hidden features"})
    activation: str = field(default="relu", metadata={"help": f"between down and up: {', '.join(ACTIVATIONS)}"})
    dropout: float = field(default=0.0, metadata={"help": "dropout on its input, in training only"})
    scaling: float = field(default=1.0, metadata={"help": "factor of what it adds"})

    peft_type: ClassVar[str] = "BOTTLENECK"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation not in ACTIVATIONS:
            close = strict.did_you_mean(self.activation, ACTIVATIONS)
            raise ValueError(f"activation={self.activation!r} must be one of {', '.join(ACTIVATIONS)}{close}")
        check_size("bottleneck_size", self.bottleneck_size)
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout} must be in [0, 1)")
        if self.scaling == 0:
            raise ValueError(f"scaling={self.scaling} must not be 0: nothing would be added, and nothing learnt")

    def attach(self, model: "LlamaForCausalLM", name: str, seed: int, tokenizer: Any = None) -> None:
        """Put a network that changes nothing yet behind the sublayers of every layer."""
        for layer_idx, sublayer, adapters in self._sites(model):
            key = (seed, name, "init", layer_idx, f"{sublayer}.adapter_down")
            adapters[name] = Bottleneck(
                *self._initial_down(model, key),
                activation=ACTIVATIONS[self.activation],
                scaling=self.scaling,
                dropout=self.dropout,
                seed=seed,
                layer_idx=layer_idx,
                input_name=f"behind {sublayer}",
            )

    def _sites(self, model: "LlamaForCausalLM") -> Iterator[tuple[int, str, AdapterDict]]:
        """Layer index, sublayer and the dictionary behind it, in the model's order."""
        for layer_idx, layer in enumerate(model.decoder_layers):
            behind = {"self_attn": layer.behind_attn_, "mlp": layer.behind_mlp_}
            for sublayer in PLACEMENTS[self.placement]:
                yield layer_idx, sublayer, behind[sublayer]

    def _initial_down(self, model: "LlamaForCausalLM", key: tuple[object, ...]) -> tuple[Tensor, Tensor]:
        """Weight ``[H, D]`` and bias ``[H]``, distributed as those of a fresh ``nn.Linear``."""
        size, dtype = model.config_.hidden_size, wide_dtype(model.dtype)
        bound, generator = 1 / math.sqrt(size), generator_for(*key)
        weight = torch.empty(self.bottleneck_size, size, dtype=dtype).uniform_(-bound, bound, generator=generator)
        bias = torch.empty(self.bottleneck_size, dtype=dtype).uniform_(-bound, bound, generator=generator)
        return weight.to(model.device), bias.to(model.device)

    def named_weights(self, model: "LlamaForCausalLM", name: str) -> Iterator[NamedWeight]:
        """Names such as ``bottleneck.layers.0.mlp.adapter_down.weight``."""
        for layer_idx, sublayer, adapters in self._sites(model):
            prefix, own = f"bottleneck.layers.{layer_idx}.{sublayer}", adapters[name]
            yield f"{prefix}.adapter_down.weight", own.down_weight, None
            yield f"{prefix}.adapter_down.bias", own.down_bias, None
            yield f"{prefix}.adapter_up.weight", own.up_weight, None
            yield f"{prefix}.adapter_up.bias", own.up_bias, None


class Bottleneck(nn.Module):
    """``z + s up(act(down(z)))``; it starts as the identity, with an up of zeros.

    Args:
        down_weight: ``[H, D]``.
        down_bias: ``[H]``.
        activation: of the hidden features.
        scaling: s.
        dropout: probability of zeroing a feature of what goes down during training.
        seed: of the adapter's draws.
        layer_idx: the decoder layer it belongs to.
        input_name: the sublayer behind which it sits, for its draws.
    """

    def __init__(
        self,
        down_weight: Tensor,
        down_bias: Tensor,
        *,
        activation: Callable[[Tensor], Tensor],
        scaling: float,
        dropout: float,
        seed: int,
        layer_idx: int,
        input_name: str,
    ) -> None:
        super().__init__()
        self.down_weight = nn.Parameter(down_weight)
        self.down_bias = nn.Parameter(down_bias)
        self.up_weight = nn.Parameter(down_weight.new_zeros(down_weight.shape[::-1]))  # [D, H]
        self.up_bias = nn.Parameter(down_weight.new_zeros(down_weight.shape[1]))
        self.activation_ = activation
        self.scaling_ = scaling
        self.dropout_ = dropout
        self.seed_ = seed
        self.layer_idx_ = layer_idx
        self.input_name_ = input_name

    def forward(self, z: Tensor, segment: Segment, batch: ForwardBatch) -> Tensor:
        """A sublayer's output ``[n, D]`` of the segment's tokens as it is to join the residual stream."""
        mask = batch.dropout_mask(segment, self.seed_, self.dropout_, self.layer_idx_, self.input_name_, z)
        hidden = _linear(z if mask is None else z * mask, self.down_weight, self.down_bias)  # [n, H]
        added = _linear(self.activation_(hidden), self.up_weight, self.up_bias)
        return (z + self.scaling_ * added).to(z.dtype)


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``x W^T + b`` of ``[n, I]``: on a GPU in x's dtype, else in the weights'.

    A CPU's bfloat16 products of odd widths read into the next row, which may be another adapter's.
    """
    if x.device.type == "cuda":
        return nn.functional.linear(x, weight.to(x.dtype), bias.to(x.dtype))
    return ops.wide_linear(ops.Recomputable(x), weight) + bias
