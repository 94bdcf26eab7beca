"""The mixture's products over D on a CPU, compiled: of every token with the factors of its own experts alone.

Letters: T tokens, P parts, D model, E experts, K top-k, R rank, S stacks of factors that one input meets, or that add
to one result.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..compiled import CompiledFunction

_GROUP = "pppiiiiiiii"
_lower = CompiledFunction("mixlora_lower", _GROUP + "pp")
_raise = CompiledFunction("mixlora_raise", _GROUP + "pp")
_outer = CompiledFunction("mixlora_outer", _GROUP + "ppp")


@dataclass(frozen=True)
class ModelPart:
    """One part's share.

    Args:
        length: its tokens.
        stacks: its factors, ``[E, R, D]`` each, or all turned, ``[E, D, R]``.
        mask: of x, ``[length, D]``, or None.
        scaling: of every factor.
    """

    length: int
    stacks: Sequence[Tensor]
    mask: Tensor | None = None
    scaling: float = 1.0


class ModelProducts:
    """What there is to multiply.

    Args:
        experts: LongTensor ``[T, K]``.
        parts: they agree in S, E and R.
        dtype: of x and of all results.
        is_turned: whether the factors are.

    Raises:
        IndexError: by every product, for an expert that there is not.
    """

    def __init__(
        self, experts: Tensor, parts: Sequence[ModelPart], dtype: torch.dtype, *, is_turned: bool = False
    ) -> None:
        one = parts[0].stacks[0]
        rank, features = (one.shape[2], one.shape[1]) if is_turned else (one.shape[1], one.shape[2])
        self._dtype, self._tokens, self._features = dtype, experts.shape[0], features
        self._shape = len(parts), len(parts[0].stacks), *one.shape
        self._all_ranks = one.shape[0] * rank
        described = array("q")
        self._alive: list[Tensor | None] = [experts.to(torch.int64).contiguous()]  # what only addresses speak of
        for part in parts:
            own: list[Tensor | None] = [None if part.mask is None else part.mask.to(dtype).contiguous()]
            own += [factor.to(torch.float32).contiguous() for factor in part.stacks]
            self._alive += own
            described.extend([part.length, *(0 if tensor is None else tensor.data_ptr() for tensor in own)])
        sizes = self._tokens, features, len(parts), one.shape[0], experts.shape[1], rank, len(parts[0].stacks)
        scalings = array("f", [part.scaling for part in parts])
        self._arguments = (self._alive[0], described, scalings, *sizes, int(is_turned))

    def lower(self, x: Tensor) -> list[Tensor]:
        """``A_e x`` of each token's experts, zeros for the others: of each stack, ``[T, ER]``."""
        results = [x.new_empty(self._tokens, self._all_ranks) for _ in range(self._shape[1])]
        addresses = array("q", [result.data_ptr() for result in results])
        _lower(self._dtype, *self._arguments, x.contiguous(), addresses)
        return results

    def raise_(self, lowered: Tensor) -> Tensor:
        """``sum_e B_e lowered_e`` over each token's experts and all stacks, times its mask, ``[T, D]``.

        Args:
            lowered: ``[T, S*ER]``, read at each token's experts alone.
        """
        result = lowered.new_empty(self._tokens, self._features)
        _raise(self._dtype, *self._arguments, lowered.contiguous(), result)
        return result

    def outer(self, lowered: Tensor, x: Tensor) -> Tensor:
        """The factors' gradients without their scaling, ``[P, S, *factors]`` in float32.

        Args:
            lowered: as in ``raise_``.
            x: ``[T, D]``, before its mask.
        """
        gradients = x.new_empty(self._shape, dtype=torch.float32)
        _outer(self._dtype, *self._arguments, lowered.contiguous(), x.contiguous(), gradients)
        return gradients
