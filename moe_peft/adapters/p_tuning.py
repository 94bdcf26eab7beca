"""P-tuning: embeddings before each sample, computed by an encoder that is trained (https://arxiv.org/abs/2103.10385).

Letters: V virtual tokens, D model, H encoder's hidden size, I input features.
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from moe_peft.adapters.method import NamedWeight, check_size
from moe_peft.adapters.virtual_tokens import (
    PROMPT_EMBEDDINGS,
    Dense,
    Draws,
    Embedding,
    VirtualTokenMethod,
    check_encoder_size,
)
from moe_peft.model.draws import dropout_mask
from moe_peft.model.virtual_tokens import FreeVirtualTokens

if TYPE_CHECKING:
    from moe_peft.model.batch import Segment
    from moe_peft.model.forward import ForwardBatch
    from moe_peft.model.llama import LlamaForCausalLM

_NUM_LAYERS = 2  # PEFT's default, which its MLP takes no notice of
_MOST_LAYERS = 64  # deeper LSTMs learn nothing
_LSTM_WEIGHT = re.compile(r"lstm_head\.(\d+)\.(\w+)")


@dataclass(frozen=True, kw_only=True)
class PromptEncoderConfig(VirtualTokenMethod):
    """Settings of P-tuning, spelled as PEFT spells them.

    Raises:
        ValueError: on a value outside its rule, or one that the chosen encoder has no use for.
    """

    encoder_reparameterization_type: Literal["MLP", "LSTM"] = field(
        default="MLP", metadata={"help": "the encoder: MLP, or LSTM in both directions with an MLP behind it"}
    )
    encoder_hidden_size: int | None = field(
        default=None, metadata={"help": "the encoder's width; null: the base model's hidden size"}
    )
    encoder_num_layers: int = field(
        default=_NUM_LAYERS, metadata={"help": "layers of the LSTM; an MLP has always the same"}
    )
    encoder_dropout: float = field(
        default=0.0, metadata={"help": "dropout between the encoder's layers, in training only"}
    )
    inference_mode: bool = field(
        default=False,
        metadata={"help": "true, as in a saved adapter: the embeddings alone, without the encoder that computed them"},
    )

    peft_type: ClassVar[str] = "P_TUNING"

    def __post_init__(self) -> None:
        super().__post_init__()
        layers, dropout = self.encoder_num_layers, self.encoder_dropout
        check_encoder_size(self.encoder_hidden_size)
        check_size("encoder_num_layers", layers, _MOST_LAYERS)
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"encoder_dropout={dropout} must be in [0, 1)")
        if self.encoder_reparameterization_type == "MLP" and layers != _NUM_LAYERS:
            raise ValueError(
                f"encoder_num_layers={layers} is for encoder_reparameterization_type='LSTM', not for 'MLP'"
            )
        if self.encoder_reparameterization_type == "LSTM" and layers == 1 and dropout:
            raise ValueError(f"encoder_dropout={dropout} is between layers, so it must be 0 for encoder_num_layers=1")

    @property
    def takes_lr_ratio(self) -> bool:
        """The encoder's biases do."""
        return not self.inference_mode

    def attach(self, model: "LlamaForCausalLM", name: str, seed: int, tokenizer: Any = None) -> None:
        """Put a fresh encoder's virtual tokens before the adapter's samples."""
        self.check_room(model)
        draws, size = Draws(model, name, seed), model.config_.hidden_size
        table = draws.normal("embedding.weight", self.num_virtual_tokens, size)
        if self.inference_mode:
            model.prompts_[name] = FreeVirtualTokens(table)
            return
        hidden = self.encoder_hidden_size or size
        if self.encoder_reparameterization_type == "MLP":
            widths, lstm = [size, hidden, hidden, size], []
        else:
            widths = [2 * hidden, 2 * hidden, size]
            inputs = [size] + [2 * hidden] * (self.encoder_num_layers - 1)
            lstm = [LstmLayer(draws, f"lstm_head.{i}", width, hidden) for i, width in enumerate(inputs)]
        denses = [draws.dense(f"mlp_head.{2 * i}", *pair) for i, pair in enumerate(itertools.pairwise(widths))]
        model.prompts_[name] = PromptEncoder(table, lstm, denses, dropout=self.encoder_dropout, seed=seed)

    def named_weights(self, model: "LlamaForCausalLM", name: str) -> Iterator[NamedWeight]:
        """``prompt_embeddings``, or PEFT's names of the encoder's weights, an LSTM's directions by themselves."""
        for key, weight, place in super().named_weights(model, name):
            lstm = _LSTM_WEIGHT.fullmatch(key)
            if lstm is None:
                yield key, weight, place
                continue
            for direction, suffix in enumerate(("", "_reverse")):
                yield f"lstm_head.{lstm[2]}_l{lstm[1]}{suffix}", weight, direction

    def peft_shape(self, model: "LlamaForCausalLM") -> dict[str, int]:
        """D and the query heads."""
        return {"token_dim": model.config_.hidden_size, "num_attention_heads": model.config_.num_attention_heads}

    @classmethod
    def from_peft(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        """Without the encoder, which is not in the folder."""
        encoder = [key for key in data if key.startswith("encoder_")]
        own = {key: value for key, value in super().from_peft(data).items() if key not in encoder}
        return {**own, "inference_mode": True}


class LstmLayer(nn.Module):
    """One layer of an LSTM that reads forwards and backwards (https://arxiv.org/abs/1402.1128, without peepholes).

    ``nn.LSTM`` draws initial values and dropout from the global state; and here both directions are one product.

    Args:
        draws: of the initial values, as torch begins ``nn.LSTM``.
        what: its name among them.
        in_features: I.
        hidden_size: H.
    """

    def __init__(self, draws: Draws, what: str, in_features: int, hidden_size: int) -> None:
        super().__init__()

        def drawn(weight: str, *shape: int) -> nn.Parameter:
            return nn.Parameter(draws.uniform(f"{what}.{weight}", 1 / math.sqrt(hidden_size), 2, *shape))

        # Stacks of the two directions; gates in torch's order: input, forget, cell, output.
        self.weight_ih = drawn("weight_ih", 4 * hidden_size, in_features)
        self.weight_hh = drawn("weight_hh", 4 * hidden_size, hidden_size)
        self.bias_ih = drawn("bias_ih", 4 * hidden_size)
        self.bias_hh = drawn("bias_hh", 4 * hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """``[V, I]`` to ``[V, 2 * H]``."""
        both = torch.stack([x, x.flip(0)])  # [2, V, I]
        # The product gives either bias a gradient in memory of its own: in one they would be clipped twice.
        bias = (self.bias_ih + self.bias_hh * 1.0)[:, None]
        inputs = torch.baddbmm(bias, both, self.weight_ih.transpose(1, 2))  # [2, V, 4 * H]
        hidden = cell = inputs.new_zeros(2, 1, self.weight_hh.shape[2])
        outputs = []
        for own in inputs.split(1, dim=1):  # [2, 1, 4 * H]
            gates = torch.baddbmm(own, hidden, self.weight_hh.transpose(1, 2))
            let_in, keep, new, let_out = gates.chunk(4, dim=2)
            cell = keep.sigmoid() * cell + let_in.sigmoid() * new.tanh()
            hidden = let_out.sigmoid() * cell.tanh()
            outputs.append(hidden)
        forwards, backwards = torch.cat(outputs, dim=1)
        return torch.cat([forwards, backwards.flip(0)], dim=1)


class PromptEncoder(nn.Module):
    """Virtual tokens ``[V, D]`` out of a table ``[V, D]``, by way of an LSTM, if there is one, and an MLP.

    Args:
        table: initial values of the table.
        lstm: the layers of the LSTM; none without.
        denses: the layers of the MLP.
        dropout: probability of zeroing a feature between the LSTM's layers, or without one between the MLP's.
        seed: of the dropout.
    """

    def __init__(self, table: Tensor, lstm: list[LstmLayer], denses: list[Dense], *, dropout: float, seed: int) -> None:
        super().__init__()
        self.embedding = Embedding(table)
        self.lstm_head = nn.ModuleList(lstm)
        between = [module for dense in denses for module in (dense, nn.ReLU())]
        self.mlp_head = nn.Sequential(*between[:-1])
        self.dropout_ = dropout
        self.seed_ = seed

    @property
    def num_virtual_tokens(self) -> int:
        """V."""
        return self.embedding.weight.shape[0]

    def forward(self, segment: "Segment | None" = None, batch: "ForwardBatch | None" = None) -> Tensor:
        """``[V, D]``; in a training batch with the dropout of a segment's step, otherwise without any."""

        def dropped(x: Tensor, layer: int) -> Tensor:
            if segment is None or batch is None or not batch.training or not self.dropout_:
                return x
            key = batch.draw_key(segment, self.seed_, "dropout", PROMPT_EMBEDDINGS, layer)
            return x * dropout_mask(tuple(x.shape), self.dropout_, like=x, key=key)

        x = self.embedding.weight
        for i, layer in enumerate(self.lstm_head):
            x = layer(dropped(x, i) if i else x)
        for i, layer in enumerate(self.mlp_head):
            is_between = isinstance(layer, Dense) and i > 0 and not len(self.lstm_head)
            x = layer(dropped(x, i) if is_between else x)
        return x
