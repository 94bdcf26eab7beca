"""What an operation of kernels/ is measured on: its inputs, three ways to compute it, and what it needs at least.

Letters: T tokens, B samples, R rank, E experts, K top-k, D model, F ffn.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from presets import SHAPES as RANDOM_SHAPES
from torch import Tensor

from moe_peft.model.config import LlamaConfig

SHAPES = {
    "smollm2-135m": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
    ),
    **RANDOM_SHAPES,
}

Tensors = Sequence[Tensor]
Inputs = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operation at one shape.

    Args:
        shape: of its inputs, for people.
        inputs: by name.
        differentiated: the inputs that get a gradient.
        read_again: the inputs that the backward cannot do without.
        flops: of the products in the forward, and in the backward on top.
        ours: the operation.
        naive: the same for autograd; it computes in its inputs' dtype, whatever that is.
        reference: of the inputs and the outputs' gradients (None: forward alone), to the outputs and the gradients of
            the differentiated inputs; None where every device runs the same.
    """

    shape: str
    inputs: dict[str, Tensor]
    differentiated: Sequence[str]
    read_again: Sequence[str]
    flops: tuple[float, float]
    ours: Callable[[Inputs], Tensor | Tensors]
    naive: Callable[[Inputs], Tensor | Tensors]
    reference: Callable[[Inputs, Tensors | None], tuple[Tensors, Tensors]] | None = None

    def bytes_needed(self, outputs: Tensors) -> tuple[int, int]:
        """What has to pass through memory in the forward, and in the backward on top.

        Forward: every input read once, every output written once. Backward: every output's gradient and every input in
        ``read_again`` read once, every gradient written once in its input's dtype.
        """
        results = sum(x.nbytes for x in outputs)
        again = sum(self.inputs[name].nbytes for name in self.read_again)
        gradients = sum(self.inputs[name].nbytes for name in self.differentiated)
        return sum(x.nbytes for x in self.inputs.values()) + results, results + again + gradients


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the cases are made for.

    Args:
        config: shape of the model.
        dtype: of its weights and hidden states; adapters and routers are float32 at least, as in training.
        device: of every tensor.
        tokens: T.
        samples: B, of about the same length.
        adapters: that share the tokens of ``lora_linear``.
        rank: R.
        experts: E.
        top_k: K.

    Raises:
        ValueError: when a number cannot be.
    """

    config: LlamaConfig
    dtype: torch.dtype
    device: torch.device
    tokens: int
    samples: int
    adapters: int
    rank: int
    experts: int
    top_k: int

    def __post_init__(self) -> None:
        for name in ("tokens", "samples", "adapters", "rank", "experts", "top_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("samples", "adapters"):
            if getattr(self, name) > self.tokens:
                raise ValueError(f"{name}={getattr(self, name)} must be at most tokens={self.tokens}")
        if self.top_k > self.experts:
            raise ValueError(f"top_k={self.top_k} must be in 1..experts={self.experts}")

    @property
    def widths(self) -> tuple[int, int, int]:
        """T, D and F."""
        return self.tokens, self.config.hidden_size, self.config.intermediate_size

    @property
    def wide(self) -> torch.dtype:
        """Of adapters."""
        return torch.promote_types(self.dtype, torch.float32)

    def normal(self, *shape: int, wide: bool = False, std: float = 1.0) -> Tensor:
        """Random numbers, the same at every call of a process that seeded torch."""
        return torch.randn(shape, dtype=self.wide if wide else self.dtype, device=self.device).mul_(std)

    def weight(self, *shape: int, wide: bool = False) -> Tensor:
        """Random numbers that keep a product with their last dimension near 1."""
        return self.normal(*shape, wide=wide, std=shape[-1] ** -0.5)

    def ends(self, count: int) -> list[int]:
        """The tokens in parts, as even as whole tokens allow: 0, the end of each, T."""
        return [round(self.tokens * i / count) for i in range(count + 1)]

    def routing(self) -> tuple[Tensor, Tensor]:
        """Gates and experts ``[T, K]``, every expert as likely as the others."""
        scores = torch.rand(self.tokens, self.experts, dtype=self.wide, device=self.device)
        gates, experts = scores.softmax(-1).topk(self.top_k, dim=-1)
        return gates / gates.sum(-1, keepdim=True), experts
