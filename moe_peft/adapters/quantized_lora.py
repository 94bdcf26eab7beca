"""Quantized LoRA: factors that act, and are saved, as integers of a few bits with a scale a group.

Letters: I input features, O output features, R rank, G groups of a rank's entries, F features (I of A, O of B).
"""

import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from moe_peft.adapters.lora import PLAIN_INITS, LoraConfig, peft_prefix
from moe_peft.adapters.method import check_size
from moe_peft.adapters.packed_bits import pack_bits, unpack_bits
from moe_peft.model.linear import Linear, Lora

if TYPE_CHECKING:
    from moe_peft.model.llama import LlamaForCausalLM

_FACTORS = ("lora_A", "lora_B")
_INTEGERS, _SCALES, _WEIGHT = ".integers", ".scales", ".weight"  # behind a factor's checkpoint prefix
# Eight significant bits, and the exponents of float32: their products with integers of eight bits are exact.
_SCALE_DTYPE = torch.bfloat16


@dataclass(frozen=True, kw_only=True)
class QuantizedLoraConfig(LoraConfig):
    """Settings of a LoRA adapter whose factors are quantized in training as they will be in its file.

    Raises:
        ValueError: on a value outside its rule.
    """

    bits: int = field(default=4, metadata={"help": "of each entry of the factors, 2..8"})
    group_size: int = field(
        default=64, metadata={"help": "entries of a row of A, or of a column of B, that share a scale"}
    )

    peft_type: ClassVar[str] = "QUANTIZED_LORA"
    inits: ClassVar[tuple[str, ...]] = PLAIN_INITS

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits} must be in 2..8")
        check_size("group_size", self.group_size)

    def new_lora(self, linear: Linear, seed: int, name: str, layer_idx: int, projection: str) -> "QuantizedLora":
        """Factors for one projection as LoRA's, acting quantized."""
        lora_a, lora_b = self.initial_factors(linear, (), seed, name, layer_idx, projection)
        return QuantizedLora(
            lora_a,
            lora_b,
            bits=self.bits,
            group_size=self.group_size,
            scaling=self.scaling,
            dropout=self.lora_dropout,
            seed=seed,
        )

    def to_saved(self, model: "LlamaForCausalLM", name: str) -> dict[str, Tensor]:
        """Each factor as a stream of integers of ``bits`` bits, uint8, and its scales ``[R, G]``, bfloat16."""
        state = super().to_saved(model, name)
        for layer_idx, projection, _ in self.adapted(model):
            for factor in _FACTORS:
                key = f"{peft_prefix(layer_idx, projection)}.{factor}"
                integers, scales = quantized(_by_rank(factor, state.pop(key + _WEIGHT)), self.bits, self.group_size)
                # From 0 on; the highest code stays free, to be told from an entry where the last byte is filled up.
                codes = (integers.nan_to_num() + _highest(self.bits)).to(torch.uint8)
                state[key + _INTEGERS], state[key + _SCALES] = pack_bits(codes, self.bits), scales.to(_SCALE_DTYPE)
        return state

    def from_saved(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The factors, whose quantized values are themselves, to the bit.

        Raises:
            ValueError: when integers and scales do not fit each other or the settings, or a factor is not quantized.
        """
        found = dict(super().from_saved(weights))
        for name in found:
            if name.endswith(_WEIGHT):
                key = name.removesuffix(_WEIGHT)
                raise ValueError(f"{name} is not quantized: it must be {key}{_INTEGERS} and {key}{_SCALES}")
        for name in [name for name in found if name.endswith(_INTEGERS)]:
            key = name.removesuffix(_INTEGERS)
            if key + _SCALES in found:
                values = self._decoded(name, found.pop(name), found.pop(key + _SCALES))
                found[key + _WEIGHT] = _by_rank(key.rsplit(".", 1)[-1], values).contiguous()
        return found

    def _decoded(self, name: str, packed: Tensor, scales: Tensor) -> Tensor:
        """``[R, F]`` of what stands in a file."""
        if packed.dtype != torch.uint8 or packed.dim() != 1 or scales.dim() != 2 or not scales.is_floating_point():
            has = f"{list(packed.shape)} of {packed.dtype} with scales {list(scales.shape)} of {scales.dtype}"
            raise ValueError(f"{name} is {has}, not a row of bytes with a matrix of scales")
        codes = unpack_bits(packed, self.bits)
        codes = codes[: codes.numel() - _trailing(codes, 2**self.bits - 1)]
        ranks, groups = scales.shape
        features = codes.numel() // max(ranks, 1)
        if codes.numel() != ranks * features or -(-features // self.group_size) != groups:
            raise ValueError(
                f"{name} holds {codes.numel()} integers of bits={self.bits} beside scales {list(scales.shape)}, "
                f"which are not {groups} groups of group_size={self.group_size} in each of {ranks} rows"
            )
        integers = codes.view(ranks, features).float() - _highest(self.bits)
        return integers * _spread(scales.float(), features, self.group_size)


class QuantizedLora(Lora):
    """A factor pair that acts as its nearest quantized one, and takes that one's gradient for its own.

    Args:
        lora_A: ``[R, I]``.
        lora_B: ``[O, R]``.
        bits: of an entry.
        group_size: entries of a rank that share a scale.
        scaling: factor of the product.
        dropout: probability of zeroing a feature of the input during training.
        seed: of the adapter's draws.
    """

    def __init__(
        self,
        lora_A: Tensor,
        lora_B: Tensor,
        *,
        bits: int,
        group_size: int,
        scaling: float,
        dropout: float,
        seed: int,
    ) -> None:
        super().__init__(lora_A, lora_B, scaling=scaling, dropout=dropout, seed=seed)
        self.bits_ = bits
        self.group_size_ = group_size

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """The quantized factors; their gradients go straight through to the parameters."""
        lora_a = fake_quantized(self.lora_A, self.bits_, self.group_size_)
        lora_b = fake_quantized(self.lora_B.T, self.bits_, self.group_size_).T
        return lora_a, lora_b


def fake_quantized(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """``[R, F]`` quantized and back, with the straight-through gradient (https://arxiv.org/abs/1308.3432).

    The gradient is passed on to every entry: the scales fit the largest one, so that none lies outside the range.
    """
    integers, scales = quantized(weight.detach(), bits, group_size)
    acting = integers * _spread(scales, weight.shape[1], group_size)
    return acting + (weight - weight.detach())  # plus zero, exactly


def quantized(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Integers and scales whose products are nearest to a weight, symmetric about zero.

    A group's scale is its largest magnitude over ``2**(bits-1) - 1``, to the eight significant bits that bfloat16
    keeps. That moves the largest magnitude by less than half a step, so it gets the largest integer; and the product of
    an integer and a scale is exact in float32. Hence quantizing the products gives the same integers and scales again.
    A group whose scale would be below the smallest normal number is zero; one that would overflow float32 is clipped.

    Args:
        weight: ``[R, F]``, float32 or float64.
        bits: of an integer, 2..8.
        group_size: entries of a row that share a scale; the last group of a row may be shorter.

    Returns:
        Integers ``[R, F]`` in ``-(2**(bits-1) - 1)..2**(bits-1) - 1`` and scales ``[R, G]``, of the weight's dtype.
        Where a group is not finite its scale is not either.
    """
    ranks, features = weight.shape
    highest = _highest(bits)
    group_size = min(group_size, features)  # a group that is wider holds the row alone
    padded = torch.nn.functional.pad(weight.abs(), (0, -features % group_size))
    largest = padded.view(ranks, -1, group_size).amax(dim=2)  # [R, G]
    # Cut, not rounded, at the top: the largest bfloat16 whose product with the largest integer is a float32 still.
    ceiling = _bfloat16_below(torch.finfo(torch.float32).max / highest)
    scales = (largest / highest).clamp(max=ceiling).to(_SCALE_DTYPE).to(weight.dtype)
    scales = scales.masked_fill(scales < torch.finfo(torch.float32).tiny, 0.0)
    scales = torch.where(largest.isfinite(), scales, largest)
    spread = _spread(scales, features, group_size)
    integers = (weight / spread.masked_fill(spread == 0, torch.inf)).round().clamp(-highest, highest)
    return integers, scales


def _bfloat16_below(value: float) -> float:
    """The largest bfloat16 number that is not above a positive float32 number: its upper two bytes."""
    (single,) = struct.unpack("<I", struct.pack("<f", value))
    (upper,) = struct.unpack("<f", struct.pack("<I", single & ~0xFFFF))
    return float(upper)


def _highest(bits: int) -> int:
    """The largest integer that ``bits`` bits hold beside its negative."""
    return 2 ** (bits - 1) - 1


def _spread(scales: Tensor, features: int, group_size: int) -> Tensor:
    """Each entry's scale ``[R, F]``, from each group's ``[R, G]``."""
    return scales.repeat_interleave(min(group_size, features), dim=1)[:, :features]


def _by_rank(factor: str, weight: Tensor) -> Tensor:
    """A row a rank: A as it is, B transposed; and back."""
    return weight if factor == "lora_A" else weight.T


def _trailing(codes: Tensor, code: int) -> int:
    """How many of the last entries are ``code``."""
    others = (codes != code).nonzero()
    return codes.numel() - int(others[-1]) - 1 if others.numel() else codes.numel()
