"""Which tokens a forward is to predict, and from which positions.

Letters: T tokens, N positions with a target, B samples.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_peft.model.batch import IGNORE_INDEX, ModelInput
from moe_peft.model.forward import ForwardBatch


@dataclass(frozen=True)
class Targets:
    """The supervised positions of a batch, on the CPU: labels shifted to the position that predicts them.

    Args:
        rows: LongTensor ``[N]``, ascending positions in ``0..T-1``.
        ids: LongTensor ``[N]``, the token each predicts.
        firsts: each sample's first such position, counted from the sample's start; its last token where it has none.
    """

    rows: Tensor
    ids: Tensor
    firsts: tuple[int, ...]

    @classmethod
    def of(cls, model_input: ModelInput, vocab_size: int) -> "Targets | None":
        """The targets of a batch with labels; None without.

        Raises:
            ValueError: on a label outside the vocabulary.
        """
        if model_input.labels is None:
            return None
        labels, edges = model_input.labels.cpu(), model_input.boundaries_
        shifted = torch.full_like(labels, IGNORE_INDEX)
        shifted[:-1] = labels[1:]
        shifted[torch.tensor(edges[1:]) - 1] = IGNORE_INDEX  # a sample's last position predicts nothing
        rows = (shifted != IGNORE_INDEX).nonzero().squeeze(1)
        ids = shifted[rows]
        if rows.numel() and (ids.min() < 0 or ids.max() >= vocab_size):
            raise ValueError(f"labels must be {IGNORE_INDEX} or in 0..vocab_size-1={vocab_size - 1}")
        starts = torch.searchsorted(rows, torch.tensor(edges[:-1])).tolist()
        positions = [*rows.tolist(), edges[-1]]
        firsts = (
            min(positions[i], end - 1) - start
            for i, (start, end) in zip(starts, itertools.pairwise(edges), strict=True)
        )
        return cls(rows, ids.long(), tuple(firsts))

    def rows_within(self, answered: ForwardBatch) -> Tensor:
        """Where the positions stand among the tokens that the last layer answered, ``[N]``."""
        rows = self.rows
        for step in _path(answered):
            assert step.host_rows is not None
            rows = torch.searchsorted(step.host_rows, rows)
        return rows

    def bounds(self, edges: Sequence[int]) -> list[int]:
        """How many positions stand before each of these tokens."""
        found: list[int] = torch.searchsorted(self.rows, torch.tensor(edges)).tolist()
        return found


def _path(batch: ForwardBatch) -> list[ForwardBatch]:
    """The narrowings that lead to a batch, outermost first."""
    return [*_path(batch.whole), batch] if batch.whole is not None else []
