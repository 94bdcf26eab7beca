"""DoRA: a weight's rows keep their direction and their length apart (https://arxiv.org/abs/2402.09353).

Letters: I input features, O output features, R rank, n tokens of one adapter.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moe_peft.adapters.base_inits import ShiftedLora, is_base_init
from moe_peft.adapters.lora import LoraConfig, peft_prefix
from moe_peft.adapters.method import NamedWeight
from moe_peft.model.fixed_weights import of_fixed_weights
from moe_peft.model.linear import Linear

if TYPE_CHECKING:
    from moe_peft.model.llama import LlamaForCausalLM

_ROWS = 1024  # of a narrow weight that are widened at once


@dataclass(frozen=True, kw_only=True)
class DoraConfig(LoraConfig):
    """Settings of a DoRA adapter: LoRA's, under which each output row's length is trained on its own.

    Raises:
        ValueError: on a value outside its rule, or an unknown target module.
    """

    def new_lora(self, linear: Linear, seed: int, name: str, layer_idx: int, projection: str) -> "Dora":
        """Factors as LoRA's for one projection, and the lengths of the rows that they give at the start."""
        is_shifted = is_base_init(self.init_lora_weights)
        if is_shifted:
            factors = self.base_factors(linear, seed, name, layer_idx, projection)
        else:
            factors = self.initial_factors(linear, (), seed, name, layer_idx, projection)
        return Dora(
            *factors,
            linear.base_layer_.weight,
            scaling=self.scaling,
            dropout=self.lora_dropout,
            seed=seed,
            is_shifted=is_shifted,
        )

    def named_weights(self, model: "LlamaForCausalLM", name: str) -> Iterator[NamedWeight]:
        """PEFT's checkpoint names with the parameter that holds each weight."""
        yield from super().named_weights(model, name)
        for layer_idx, projection, linear in self.adapted(model):
            key = f"{peft_prefix(layer_idx, projection)}.lora_magnitude_vector"
            yield key, linear.loras_[name].lora_magnitude_vector, None

    @classmethod
    def claims(cls, data: Mapping[str, Any]) -> bool:
        """LoRA's folders with ``use_dora``."""
        return not super().claims(data)

    @classmethod
    def from_peft(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        """As LoRA's; the method itself says ``use_dora``.

        Raises:
            ValueError: also when ``use_dora`` is anything but true.
        """
        if data.get("use_dora", True) is not True:
            raise ValueError(f"use_dora={data['use_dora']!r} must be true or false")
        return super().from_peft({key: value for key, value in data.items() if key != "use_dora"})

    def to_peft(self, model: "LlamaForCausalLM", name: str) -> dict[str, Any]:
        """With PEFT's word for the method."""
        return {**super().to_peft(model, name), "use_dora": True}


class Dora(ShiftedLora):
    """``W' = m (W + s B A) / ||W + s B A||``, row by row; the length in the denominator is taken as a constant.

    Args:
        lora_A: ``[R, I]``.
        lora_B: ``[O, R]``.
        weight: the frozen ``W``, ``[O, I]``.
        scaling: s.
        dropout: probability of zeroing a feature of the low-rank product's input during training.
        seed: of the adapter's draws.
        is_shifted: whether the factors started from the weight, as ``ShiftedLora``'s.
    """

    changes_output_ = True
    row_squares_: Tensor

    def __init__(
        self,
        lora_A: Tensor,
        lora_B: Tensor,
        weight: Tensor,
        *,
        scaling: float,
        dropout: float,
        seed: int,
        is_shifted: bool,
    ) -> None:
        super().__init__(lora_A, lora_B, scaling=scaling, dropout=dropout, seed=seed, is_shifted=is_shifted)
        squares = torch.linalg.vector_norm(weight, dim=1, dtype=lora_A.dtype).square()
        self.register_buffer("row_squares_", squares, persistent=False)  # ||w_i||^2, [O]
        self.lora_magnitude_vector = nn.Parameter(self.row_norms(weight))

    @torch.no_grad()
    def row_norms(self, weight: Tensor) -> Tensor:
        """``||W + s B A||`` of each row, ``[O]`` in the adapter's dtype, by products with R columns alone.

        Args:
            weight: the frozen ``W``, ``[O, I]``.
        """
        lora_a, lora_b = self.low_rank()
        lowered = torch.cat([rows.to(lora_a.dtype) @ lora_a.T for rows in weight.split(_ROWS)])  # W A^T, [O, R]
        # (BA)_i is row i of B times A: <w_i, (BA)_i> = <(W A^T)_i, b_i>, and ||(BA)_i||^2 = b_i (A A^T) b_i^T.
        crossed = (lowered * lora_b).sum(1)
        squared = ((lora_b @ (lora_a @ lora_a.T)) * lora_b).sum(1)
        s = self.scaling_
        squares = self.row_squares_ + 2 * s * crossed + s * s * squared
        return squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()  # a row of zeros stays one, without 0 / 0

    def behind(self, y: Tensor, base_layer: nn.Linear) -> Tensor:
        """The rows' lengths changed, the bias left out of it."""
        scaled: Tensor = _Stretched.apply(y, of_fixed_weights(self._stretch, base_layer), base_layer.bias)
        return scaled

    def _stretch(self, base_layer: nn.Linear) -> Tensor:
        """What the lengths' ratio is more than one, ``[O]``."""
        return self.lora_magnitude_vector / self.row_norms(base_layer.weight) - 1

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``W'``, and the bias as it is."""
        ratio = self.lora_magnitude_vector / self.row_norms(weight)
        lora_a, lora_b = self.low_rank()
        return ratio[:, None] * (weight + self.scaling_ * (lora_b @ lora_a)), bias


class _Stretched(torch.autograd.Function):
    """``y + (y - b) d`` of y ``[n, O]``, d ``[O]`` and a frozen bias b ``[O]`` or None.

    What is rounded to y's dtype is the ratio less one: the ratio itself would be off by the same amount in every token.
    Nothing as wide as the adapter's dtype is made of y, which autograd's own products would do.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, stretch: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(y, stretch, bias)
        narrow = stretch.to(y.dtype)
        stretched = torch.addcmul(y, y, narrow)
        return stretched if bias is None else stretched.sub_(bias * narrow)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None]:
        y, stretch, bias = ctx.saved_tensors
        d_stretch = None
        if ctx.needs_input_grad[1]:
            d_stretch = (dy * y).sum(0, dtype=stretch.dtype)
            if bias is not None:
                d_stretch -= bias * dy.sum(0, dtype=stretch.dtype)
        return torch.addcmul(dy, dy, stretch.to(dy.dtype)), d_stretch, None
