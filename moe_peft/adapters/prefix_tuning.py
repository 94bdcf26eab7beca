"""Prefix tuning: trained keys and values before each sample's own, in every layer (https://arxiv.org/abs/2101.00190).

Letters: V virtual tokens, N layers, G key-value heads, d features per head, H the projection's hidden size.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from moe_peft.adapters.virtual_tokens import (
    PROMPT_EMBEDDINGS,
    Dense,
    Draws,
    Embedding,
    VirtualTokenMethod,
    check_encoder_size,
)
from moe_peft.model.linear import AdapterDict
from moe_peft.model.virtual_tokens import FreeVirtualTokens

if TYPE_CHECKING:
    from moe_peft.model.batch import Segment
    from moe_peft.model.forward import ForwardBatch
    from moe_peft.model.llama import LlamaForCausalLM


@dataclass(frozen=True, kw_only=True)
class PrefixTuningConfig(VirtualTokenMethod):
    """Settings of prefix tuning, spelled as PEFT spells them.

    Raises:
        ValueError: on a value outside its rule, or a size of a projection that is not there.
    """

    prefix_projection: bool = field(
        default=False, metadata={"help": "compute the prefix from a smaller table by an MLP, in training only"}
    )
    encoder_hidden_size: int | None = field(
        default=None, metadata={"help": "the MLP's width; null: key-value heads times head size"}
    )
    init_weights: Literal["zero"] | None = field(
        default=None, metadata={"help": "zero: a prefix of zeros; null: a random one"}
    )

    peft_type: ClassVar[str] = "PREFIX_TUNING"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_encoder_size(self.encoder_hidden_size)
        if self.encoder_hidden_size is not None and not self.prefix_projection:
            raise ValueError(f"encoder_hidden_size={self.encoder_hidden_size} is for prefix_projection=true")

    @property
    def takes_lr_ratio(self) -> bool:
        """The projection's biases do."""
        return self.prefix_projection

    @property
    def inserted_tokens(self) -> int:
        """None: a prefix costs its keys and values, and no pass through a layer."""
        return 0

    def held_in(self, model: "LlamaForCausalLM") -> AdapterDict:
        """The prefixes."""
        return model.prefixes_

    def attach(self, model: "LlamaForCausalLM", name: str, seed: int, tokenizer: Any = None) -> None:
        """Put a fresh prefix before the adapter's samples in every layer."""
        self.check_room(model)
        draws, config = Draws(model, name, seed), model.config_
        size = config.num_kv_heads * config.head_size
        whole = config.num_hidden_layers * 2 * size
        if not self.prefix_projection:
            prefix = draws.normal(PROMPT_EMBEDDINGS, self.num_virtual_tokens, whole)
            model.prefixes_[name] = FreeVirtualTokens(prefix if self.init_weights is None else torch.zeros_like(prefix))
            return
        hidden = self.encoder_hidden_size or size
        table = draws.normal("embedding.weight", self.num_virtual_tokens, size)
        denses = draws.dense("transform.0", size, hidden), draws.dense("transform.2", hidden, whole)
        if self.init_weights == "zero":
            with torch.no_grad():
                denses[1].weight.zero_()
                denses[1].bias.zero_()
        model.prefixes_[name] = PrefixEncoder(table, *denses)

    def peft_shape(self, model: "LlamaForCausalLM") -> dict[str, int]:
        """Those of the keys."""
        config = model.config_
        return {"token_dim": config.num_kv_heads * config.head_size, "num_attention_heads": config.num_kv_heads}

    @classmethod
    def from_peft(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        """Without the projection, which is not in the folder, and the beginning of what is."""
        beginning = ("prefix_projection", "encoder_hidden_size", "init_weights")
        return {key: value for key, value in super().from_peft(data).items() if key not in beginning}


class PrefixEncoder(nn.Module):
    """A prefix ``[V, N * 2 * G * d]`` out of a table ``[V, G * d]`` by an MLP.

    Args:
        table: initial values of the table.
        first: ``[V, G * d]`` to ``[V, H]``.
        second: ``[V, H]`` to the prefix.
    """

    def __init__(self, table: Tensor, first: Dense, second: Dense) -> None:
        super().__init__()
        self.embedding = Embedding(table)
        self.transform = nn.Sequential(first, nn.Tanh(), second)

    @property
    def num_virtual_tokens(self) -> int:
        """V."""
        return self.embedding.weight.shape[0]

    def forward(self, segment: "Segment | None" = None, batch: "ForwardBatch | None" = None) -> Tensor:
        """The prefix; it has no dropout."""
        prefix: Tensor = self.transform(self.embedding.weight)
        return prefix
