"""Tensors that backward computes again instead of keeping.

Letters: T tokens, D model, F ffn.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .rms_norm.op import scaled
from .swiglu.op import swiglu


@dataclass(frozen=True)
class Recomputable:
    """A tensor and what it can be computed from, cheaply, out of tensors that are kept anyway.

    An operation that needs its input again in backward keeps the sources in its place.

    Args:
        value: the tensor itself; gradients flow through it alone.
        recipe: ``rms_norm`` or ``swiglu``; the empty string: the value is kept as it is.
        sources: of ``rms_norm``: x ``[T, D]``, rstd ``[T, 1]``, weight ``[D]``; of ``swiglu``: gate and up, ``[T, F]``.
    """

    value: Tensor
    recipe: str = ""
    sources: Sequence[Tensor] = ()

    @property
    def kept(self) -> list[Tensor]:
        """What backward needs to have the value again, apart from the graph."""
        return [source.detach() for source in self.sources]

    def rows(self, positions: Tensor | None) -> "Recomputable":
        """Some of its tokens, kept as they are: gathering the sources would keep as much. None: all."""
        return self if positions is None else Recomputable(self.value.index_select(0, positions))

    def split(self, lengths: Sequence[int]) -> list["Recomputable"]:
        """The tokens in parts of these lengths."""
        if len(lengths) == 1:
            return [self]
        sources = [s.split(list(lengths)) if s.dim() > 1 else (s,) * len(lengths) for s in self.sources]
        values = self.value.split(list(lengths))
        return [Recomputable(value, self.recipe, kept) for value, *kept in zip(values, *sources, strict=True)]


def recomputed(recipe: str, kept: Sequence[Tensor]) -> Tensor:
    """The value that a ``Recomputable`` had, to the bit; of some of its rows to rounding (SIMD ends elsewhere)."""
    if recipe == "rms_norm":
        x, rstd, weight = kept
        return scaled(x, rstd, weight)
    if recipe == "swiglu":
        gate, up = kept
        return swiglu(gate, up)
    (value,) = kept
    return value
