"""What lora_linear takes: an adapter's token range, and the factors that it brings to each projection.

Letters: I input features, O output features, R rank, n tokens of one range.
"""

from dataclasses import dataclass

from torch import Tensor

Factors = tuple[Tensor, Tensor]  # lora_a [R, I] and lora_b [O, R]
Gradients = list[list[Factors | None]]  # a range's, a projection's dA and dB


@dataclass(frozen=True)
class LoraRange:
    """One adapter's token range.

    Args:
        start: first token.
        end: one past the last token.
        factors: ``lora_a [R, I]`` and ``lora_b [O, R]`` of each projection; None where the adapter has none.
        scalings: factor of each projection's low-rank product.
        mask: dropout mask ``[n, I]`` already divided by the keep probability, or None.
    """

    start: int
    end: int
    factors: tuple[Factors | None, ...]
    scalings: tuple[float, ...]
    mask: Tensor | None = None

    @property
    def ranks(self) -> tuple[int, ...]:
        """Of each projection; 0 where it has no factors."""
        return tuple(0 if pair is None else pair[0].shape[0] for pair in self.factors)
