"""Ranks that grow: where gradients are largest, factors get more rows without any change of their product.

Letters: I input features, O output features, R rank.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe_peft.adapters.method import check_size, resize
from moe_peft.model.linear import Lora

_MOST_STEPS = 1 << 53  # up to there a float64 tells one step from the next


@dataclass(frozen=True, kw_only=True)
class Growth:
    """One look at all layers.

    Args:
        step: the optimizer step behind which it was, from 1.
        importance: of each layer: the norms of its adapter's gradients, added up since the growth before.
        ranks: of each layer behind it: the largest of its projections'.

    Raises:
        ValueError: on what no training gives, or its buffers do not hold.
    """

    step: int
    importance: tuple[float, ...]
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        check_size("step", self.step, _MOST_STEPS)
        most = torch.finfo(torch.float32).max
        for importance in self.importance:
            # A training whose gradients overflow has those that are not finite.
            if importance < 0 or most < importance < math.inf:
                raise ValueError(f"importance={importance} must be in 0..{most}, which float32 holds")
        for rank in self.ranks:
            check_size("ranks", rank)


class LayerGrowth(nn.Module):
    """What a layer's adapter has been through: buffers, so that a checkpoint holds them.

    Args:
        steps: of the growths so far.
        importances: of this layer at each.
        ranks: of this layer behind each.
        device: where it lives.
    """

    importance_: Tensor
    steps_: Tensor
    importances_: Tensor
    ranks_: Tensor

    def __init__(
        self, steps: Sequence[int], importances: Sequence[float], ranks: Sequence[int], device: torch.device
    ) -> None:
        super().__init__()
        self.register_buffer("importance_", torch.zeros((), device=device))
        self.register_buffer("steps_", torch.tensor(steps, dtype=torch.int64, device=device))
        self.register_buffer("importances_", torch.tensor(importances, dtype=torch.float32, device=device))
        self.register_buffer("ranks_", torch.tensor(ranks, dtype=torch.int64, device=device))

    def note(self, step: int, rank: int) -> None:
        """Put the importance so far behind the earlier ones, and begin anew."""
        for history, value in ((self.steps_, step), (self.importances_, self.importance_), (self.ranks_, rank)):
            history.data = torch.cat([history, history.new_tensor([float(value)])])
        self.importance_.zero_()


class GrowingLora(Lora):
    """A factor pair whose scale stays what it is whatever its rank becomes.

    Args:
        lora_A: ``[R, I]``.
        lora_B: ``[O, R]``.
        scaling: factor of the product.
        dropout: probability of zeroing a feature of the input during training.
        seed: of the adapter's draws.
    """

    growth_: LayerGrowth | None

    def __init__(self, lora_A: Tensor, lora_B: Tensor, *, scaling: float, dropout: float, seed: int) -> None:
        super().__init__(lora_A, lora_B, scaling=scaling, dropout=dropout, seed=seed)
        self.register_module("growth_", None)  # of its whole layer, on the first of the layer's projections

    @property
    def rank(self) -> int:
        """R."""
        return self.lora_A.shape[0]

    @torch.no_grad()
    def grow(self, new_rows: Tensor) -> None:
        """Twice the rank: new rows of A are given, new columns of B zero, so that their product stays to the bit.

        Args:
            new_rows: ``[R, I]``.
        """
        resize(self.lora_A, torch.cat([self.lora_A, new_rows.to(self.lora_A)]))
        resize(self.lora_B, torch.cat([self.lora_B, torch.zeros_like(self.lora_B)], dim=1))


class GrowingPair(NamedTuple):
    """A factor pair, and what draws the rows ``[R, I]`` that a rank R is doubled with."""

    lora: GrowingLora
    new_rows: Callable[[int], Tensor]


class RankGrowth:
    """Doubles the ranks of those layers that have room with the largest gradients, every so many optimizer steps.

    Args:
        layers: the pairs of each layer's projections; the first of them keeps the layer's growth.
        grow_every: optimizer steps.
        grow_share: of all layers, at least one of them; as many grow while so many have room below ``max_rank``.
        max_rank: no rank comes to lie above it.
        num_steps: of the whole training, behind the last of which nothing grows.
        num_earlier: growths of an earlier training.
    """

    def __init__(
        self,
        layers: Sequence[Sequence[GrowingPair]],
        *,
        grow_every: int,
        grow_share: float,
        max_rank: int,
        num_steps: int,
        num_earlier: int,
    ) -> None:
        self._layers = layers
        self._records = [record for pairs in layers if (record := pairs[0].lora.growth_) is not None]
        self._grow_every = grow_every
        self._num_chosen = max(1, round(grow_share * len(layers)))
        self._max_rank = max_rank
        self._num_steps = num_steps
        self._num_earlier = num_earlier
        self._last: int | None = None  # step of the last growth; not known before a checkpoint has been read

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Add up the gradients' norms; double ranks when it is time."""
        for record, pairs in zip(self._records, self._layers, strict=True):
            weights = [weight for pair in pairs for weight in (pair.lora.lora_A, pair.lora.lora_B)]
            gradients = [weight.grad for weight in weights if weight.grad is not None]
            if gradients:
                record.importance_ += torch.nn.utils.get_total_norm(gradients)
        if self._last is None:
            steps = self._records[0].steps_[self._num_earlier :]
            self._last = int(steps[-1]) if len(steps) else 0
        # A skipped step may have been the one of the growth: then it is the next that is taken.
        if step // self._grow_every > self._last // self._grow_every and step < self._num_steps:
            self._grow(step)
            self._last = step

    def _grow(self, step: int) -> None:
        importances = torch.stack([record.importance_ for record in self._records]).tolist()
        room = [[pair for pair in pairs if 2 * pair.lora.rank <= self._max_rank] for pairs in self._layers]
        open_places = [place for place, pairs in enumerate(room) if pairs]
        order = sorted(open_places, key=lambda place: -importances[place])  # stable: the lower of equals
        for place in order[: self._num_chosen]:
            for lora, new_rows in room[place]:
                lora.grow(new_rows(lora.rank))
        for record, pairs in zip(self._records, self._layers, strict=True):
            record.note(step, max(pair.lora.rank for pair in pairs))
