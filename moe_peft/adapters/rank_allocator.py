"""AdaLoRA's budget of ranks: which singular values of all its projections may stay.

The rules, and the arithmetic, of PEFT's ``RankAllocator``. Letters: I input features, O output features, R rank.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from moe_peft.model.linear import LinearAdapter

FACTORS = ("lora_A", "lora_E", "lora_B")
AVERAGES = ("importance", "uncertainty")


class AdaLora(LinearAdapter):
    """An update in the form of a singular value decomposition: ``delta = scaling * lora_B diag(lora_E) lora_A``.

    Args:
        lora_A: right singular vectors, ``[R, I]``.
        lora_E: singular values, ``[R, 1]``.
        lora_B: left singular vectors, ``[O, R]``.
        scaling: factor of the product.
        dropout: probability of zeroing a feature of the input during training.
        seed: of the adapter's draws.
    """

    rank_mask_: Tensor

    def __init__(
        self, lora_A: Tensor, lora_E: Tensor, lora_B: Tensor, *, scaling: float, dropout: float, seed: int
    ) -> None:
        super().__init__(scaling=scaling, dropout=dropout, seed=seed)
        self.lora_A = nn.Parameter(lora_A)
        self.lora_E = nn.Parameter(lora_E)
        self.lora_B = nn.Parameter(lora_B)
        self.total_step_: int | None = None  # of the training that allots its ranks
        # Whether the last allocation left a singular value.
        self.register_buffer("rank_mask_", torch.ones(lora_E.shape[0], dtype=torch.bool, device=lora_E.device))

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """The singular values go with the right vectors; None where no rank is left."""
        return (self.lora_A * self.lora_E, self.lora_B) if self.lora_E.numel() else None

    def kept_ranks(self) -> list[int]:
        """All but those that were masked and have been zero since."""
        if self.lora_E.is_meta:
            return list(range(self.lora_E.shape[0]))
        kept: list[int] = (self.rank_mask_ | (self.lora_E.detach() != 0).view(-1)).nonzero().view(-1).tolist()
        return kept

    def begin(self, total_step: int) -> None:
        """A training of that many steps allots ranks by moving averages, which begin at zero if there are none yet."""
        self.total_step_ = total_step
        if not dict(self.averages()):
            for factor in FACTORS:
                for kind in AVERAGES:
                    self.register_buffer(f"{factor}_{kind}_", torch.zeros_like(getattr(self, factor).detach()))

    @property
    def has_averages(self) -> bool:
        """Whether the moving averages are there, and needed."""
        return self.average("lora_E", AVERAGES[0]).shape == self.lora_E.shape

    def average(self, factor: str, kind: str) -> Tensor:
        """A moving average of a factor's shape in training; empty when it is not needed any more."""
        return self.get_buffer(f"{factor}_{kind}_")

    def averages(self) -> Iterator[tuple[str, Tensor]]:
        """All of them by name, of an adapter in training."""
        for name, buffer in self.named_buffers(recurse=False):
            if name != "rank_mask_":
                yield name.removesuffix("_"), buffer


class RankAllocator:
    """Masks the least important triplets of a singular value and its two vectors, globally, as the budget shrinks.

    The importance of a weight is the product of two moving averages: of its sensitivity ``|w dw|``, and of how far the
    sensitivity is from its average. That of a triplet is its value's and the means of its vectors' together. Of equal
    importances at the threshold all are masked. https://arxiv.org/abs/2303.10512

    Args:
        loras: of all projections.
        target_r: mean rank at the end.
        tinit: steps before the budget shrinks.
        tfinal: steps at the end during which the masks stay as they are.
        deltaT: steps from one allocation to the next.
        beta1: of the average of the sensitivity.
        beta2: of the average of its uncertainty.
        total_step: optimizer steps in all.
    """

    def __init__(
        self,
        loras: Sequence[AdaLora],
        *,
        target_r: int,
        tinit: int,
        tfinal: int,
        deltaT: int,
        beta1: float,
        beta2: float,
        total_step: int,
    ) -> None:
        self._loras = loras
        self._init_budget = sum(lora.lora_E.shape[0] for lora in loras)
        self._target_budget = target_r * len(loras)
        self._tinit = tinit
        self._last = total_step - tfinal
        self._interval = deltaT
        self._betas = (beta1, beta2)
        for lora in loras:
            lora.begin(total_step)

    def budget(self, step: int) -> int:
        """Singular values that may stay behind a step, counted from 1: a cubic from all to the target."""
        if step <= self._tinit:
            return self._init_budget
        if step >= self._last:
            return self._target_budget
        left = 1 - (step - self._tinit) / (self._last - self._tinit)
        return int((self._init_budget - self._target_budget) * left**3 + self._target_budget)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Take in the step's gradients; mask when an allocation is due; keep the last one's masks ever after."""
        if not any(lora.has_averages for lora in self._loras):  # the last allocation is over
            for lora in self._loras:
                _clear_masked(lora)
            return
        if step < self._last:
            self._take_in_gradients()
        # A skipped step may have been the last one of the schedule: then it is the next that is taken.
        if step >= self._last or (step > self._tinit and step % self._interval == 0):
            self._allocate(self.budget(step))
        if step >= self._last:
            self._end_averages()

    def _take_in_gradients(self) -> None:
        trained = [
            (lora, factor)
            for lora in self._loras
            for factor in FACTORS
            if lora.has_averages and getattr(lora, factor).grad is not None
        ]
        weights = [getattr(lora, factor).detach() for lora, factor in trained]
        sensitivity = list(torch._foreach_mul(weights, [getattr(lora, factor).grad for lora, factor in trained]))
        torch._foreach_abs_(sensitivity)
        means, spreads = ([lora.average(factor, kind) for lora, factor in trained] for kind in AVERAGES)
        beta1, beta2 = self._betas
        _move(means, sensitivity, beta1)
        torch._foreach_sub_(sensitivity, means)
        torch._foreach_abs_(sensitivity)
        _move(spreads, sensitivity, beta2)

    def _allocate(self, budget: int) -> None:
        num_masked = self._init_budget - budget
        if num_masked < 1:
            return
        # All of them, but in a forecast, which tries out the last layer by itself and comes to that one's end first.
        loras = [lora for lora in self._loras if lora.has_averages]
        scores = [_score(lora) for lora in loras]
        scores_of_all = torch.cat(scores)
        threshold = torch.kthvalue(scores_of_all, min(num_masked, len(scores_of_all))).values
        for lora, score in zip(loras, scores, strict=True):
            lora.rank_mask_.copy_(~(score <= threshold))
            _clear_masked(lora)

    def _end_averages(self) -> None:
        for lora in self._loras:
            for _, average in lora.averages():
                average.data = average.new_empty([0] * average.dim())


def _move(averages: list[Tensor], values: list[Tensor], beta: float) -> None:
    """``beta * average + (1 - beta) * value``, rounded where PEFT rounds."""
    torch._foreach_mul_(averages, beta)
    torch._foreach_add_(averages, torch._foreach_mul(values, 1 - beta))


def _score(lora: AdaLora) -> Tensor:
    """The importance of each triplet, ``[R]``."""
    a, e, b = (lora.average(factor, "importance") * lora.average(factor, "uncertainty") for factor in FACTORS)
    return e.view(-1) + (a.mean(dim=1) + b.mean(dim=0))


def _clear_masked(lora: AdaLora) -> None:
    lora.lora_E.masked_fill_(~lora.rank_mask_[:, None], 0.0)
