"""One adapter at one step: the fused batch against the adapter alone, and alone in other orders of its samples.

Letters: T tokens, E experts, W tensors of the adapter.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_peft.model.draws import generator_for
from moe_peft.model.forward import chosen_experts
from moe_peft.model.llama import LlamaForCausalLM
from moe_peft.training.adapter_run import AdapterRun
from moe_peft.training.fused_step import Outcome
from moe_peft.training.proof.alone import Alone
from moe_peft.training.proof.gradients import GradientMeter

# What wide dtypes may differ by; for 16-bit types it is measured, and never less than float32's.
LIMITS = {torch.float64: 1e-9, torch.float32: 1e-5}
NUM_REPEATS = 5
NOISE_FACTOR = 3
_DRAWS = 20  # among which so many other orders are, if there are


@dataclass(frozen=True)
class Gap:
    """The tensor whose gradients are furthest apart.

    Args:
        value: how far, relative to the gradient of the adapter alone.
        allowed: how far it may be.
        tensor: its name.
    """

    value: float
    allowed: float
    tensor: str

    @property
    def is_good(self) -> bool:
        """Whether it is allowed."""
        return self.value <= self.allowed


@dataclass(frozen=True, kw_only=True)
class Check:
    """What became of one adapter's micro-batch in the fused batch and alone.

    Args:
        adapter: its name.
        step: its optimizer step, from 1.
        share: of the fused batch's tokens.
        loss: in the fused batch: its part of the step's mean loss.
        loss_alone: likewise, alone.
        norm: of the gradient in the fused batch.
        norm_alone: likewise, alone.
        fused: fused batch against alone; None where it had no neighbours.
        reordered: alone with its samples in other orders against alone; None where it has only one.
        num_choices: what the routers chose, a token and layer each; 0 without routers.
        num_flips: choices that are others alone.
        num_wrong_flips: those of them that rounding does not explain.
        problems: what is wrong, in words; none when all is well.
    """

    adapter: str
    step: int
    share: float
    loss: float
    loss_alone: float
    norm: float
    norm_alone: float
    fused: Gap | None = None
    reordered: Gap | None = None
    num_choices: int = 0
    num_flips: int = 0
    num_wrong_flips: int = 0
    problems: tuple[str, ...] = ()

    @property
    def is_good(self) -> bool:
        """Whether fusing changed nothing but rounding."""
        return not self.problems

    @property
    def is_exact(self) -> bool:
        """Whether it had neighbours that changed nothing at all, to the bit."""
        is_compared = self.fused is not None and self.fused.value == 0
        return self.is_good and is_compared and self.loss == self.loss_alone and not self.num_flips


@dataclass(frozen=True)
class _Noise:
    """What another order of the samples changes, alone.

    Args:
        gradients: largest relative distance of every tensor, ``[W]``.
        losses: largest difference of the loss, and of the router losses.
        logits: largest difference of router logits, a routed layer each.
    """

    gradients: Tensor
    losses: list[float]
    logits: list[float]


class Examination:
    """Compares one adapter's share of a fused batch with the adapter alone.

    Args:
        model: with the weights of which the fused batch was computed.
        run: the adapter's training.
        fused: what the fused batch gave it.
        share: its share of that batch's tokens.
    """

    def __init__(self, model: LlamaForCausalLM, run: AdapterRun, fused: Outcome, share: float) -> None:
        self._is_wide = model.dtype in LIMITS
        self._limit = LIMITS.get(model.dtype, LIMITS[torch.float32])
        # An order of the samples changes only the order of sums, and what it makes a 16-bit type round in another way
        # (seen: 1e-7 to 1.4e-3 in bfloat16; 6e-3 in an LSTM's weight with hardly a gradient).
        self._order_limit = self._limit if self._is_wide else 2 * torch.finfo(model.dtype).eps
        self._meter = GradientMeter(model, run.job.name)
        self._top_k = run.job.adapter.top_k if fused.router_logits else 0
        self._fused, self._share = fused, share
        self._messages: list[str] = []
        self._run_alone = Alone(model, run, fused, self._messages.append)

    def check(self) -> Check:
        """Run the adapter alone as often as it takes."""
        fused = self._fused
        if fused.is_fatal:  # out of memory: alone it would be no better
            return replace(self._numbers(fused), problems=(f"in the fused batch: {fused.failure}",))
        alone, own_logits = self._run_alone()
        failure = self._failure_of(alone)
        if failure is not None:
            return replace(self._numbers(alone), problems=(failure,))
        noise = self._noise(alone, own_logits)
        if isinstance(noise, str):
            return replace(self._numbers(alone), problems=(noise,))
        return self._judge(alone, own_logits, noise)

    def _failure_of(self, alone: Outcome) -> str | None:
        for where, outcome in (("in the fused batch", self._fused), ("alone", alone)):
            if outcome.failure is not None:
                return f"{where}: {outcome.failure}"
            if not math.isfinite(self._meter.norm(outcome.gradients)):
                return f"{where}: the gradient must be finite"
        if self._fused.micro_batch.part:
            return "out of memory: its micro-batch was split, and the parts are nothing to compare with"
        return None

    def _noise(self, alone: Outcome, own_logits: tuple[Tensor, ...]) -> _Noise | str | None:
        """Of the samples in other orders, or what went wrong there; None of a single sample."""
        if len(self._fused.micro_batch.samples) == 1:
            return None
        gradients = torch.zeros(len(self._meter.names), dtype=torch.float64)
        losses, logits = [0.0, 0.0], [0.0] * len(own_logits)
        for order in self._orders():
            repeat, repeat_logits = self._run_alone(order)
            if repeat.failure is not None:
                return f"alone, its samples in another order: {repeat.failure}"
            gradients = gradients.maximum(self._meter.distance(repeat.gradients, alone.gradients))
            losses = [
                max(most, abs(one - other))
                for most, one, other in zip(losses, _losses(repeat), _losses(alone), strict=True)
            ]
            logits = [
                max(most, float((one - other).abs().max()))
                for most, one, other in zip(logits, repeat_logits, own_logits, strict=True)
            ]
        return _Noise(gradients, losses, logits)

    def _orders(self) -> Iterator[Sequence[int]]:
        """Turned round; where the rounding is to be measured, others as well, as far as there are so many."""
        micro_batch = self._fused.micro_batch
        count = len(micro_batch.samples)
        generator = generator_for("proof", micro_batch.adapter, micro_batch.step, micro_batch.index)
        orders = {tuple(range(count)[::-1]): None}
        for _ in range(0 if self._is_wide else _DRAWS):
            order = tuple(torch.randperm(count, generator=generator).tolist())
            if len(orders) < NUM_REPEATS and order != tuple(range(count)):
                orders[order] = None
        yield from orders

    def _judge(self, alone: Outcome, own_logits: tuple[Tensor, ...], noise: _Noise | None) -> Check:
        fused = reordered = None
        problems = []
        if noise is not None:
            reordered = self._gap(noise.gradients, self._order_limit)
            if not reordered.is_good:
                problems.append(f"the order of its samples changes its gradient: {_words(reordered)}")
                noise = None  # no rounding, so it explains nothing
        if self._share < 1:
            apart = self._meter.distance(self._fused.gradients, alone.gradients)
            fused = self._gap(apart, max(self._limit, self._measured(None if noise is None else noise.gradients.max())))
            if not fused.is_good:
                problems.append(f"its neighbours change its gradient: {_words(fused)}")
            problems += self._changed_losses(alone, noise)
        num_flips, num_wrong = self._flips(own_logits, noise)
        if num_wrong:
            problems.append(f"{num_wrong} routing choices differ by more than rounding")
        return replace(
            self._numbers(alone),
            fused=fused,
            reordered=reordered,
            num_choices=sum(logits.shape[0] for logits in own_logits),
            num_flips=num_flips,
            num_wrong_flips=num_wrong,
            problems=tuple(problems),
        )

    def _measured(self, noise: Tensor | float | None) -> float:
        """What a noise allows: nothing to wide types, whose limit is fixed."""
        return 0.0 if noise is None or self._is_wide else NOISE_FACTOR * float(noise)

    def _changed_losses(self, alone: Outcome, noise: _Noise | None) -> list[str]:
        problems = []
        noises = (0.0, 0.0) if noise is None else noise.losses
        for name, one, other, change in zip(
            ("loss", "aux_loss"), _losses(self._fused), _losses(alone), noises, strict=True
        ):
            if not abs(one - other) <= max(self._limit * max(abs(other), 1.0), self._measured(change)):
                problems.append(f"its neighbours change its {name}: {one:.6g} beside {other:.6g} alone")
        return problems

    def _gap(self, distance: Tensor, allowed: float) -> Gap:
        worst = int(distance.argmax())
        return Gap(float(distance[worst]), allowed, self._meter.names[worst])

    def _flips(self, own_logits: tuple[Tensor, ...], noise: _Noise | None) -> tuple[int, int]:
        """Tokens and layers whose experts are others alone; and those that were not within the noise of being so."""
        num_flips = num_wrong = 0
        for layer, (own, seen) in enumerate(zip(own_logits, self._fused.router_logits or (), strict=True)):
            chosen = chosen_experts(seen, self._top_k)
            is_flipped = (chosen != chosen_experts(own, self._top_k)).any(dim=1)
            # By its own logits, how far the worst of the fused experts is behind the last that it would choose.
            margin = own.topk(self._top_k, dim=1).values[:, -1] - own.gather(1, chosen).amin(dim=1)
            measured = self._measured(None if noise is None else noise.logits[layer])
            most = max(self._limit * float(own.abs().max()), measured)
            num_flips += int(is_flipped.sum())
            num_wrong += int((is_flipped & ~(margin <= most)).sum())
        return num_flips, num_wrong

    def _numbers(self, alone: Outcome) -> Check:
        fused = self._fused
        return Check(
            adapter=fused.micro_batch.adapter,
            step=fused.micro_batch.step + 1,
            share=self._share,
            loss=fused.loss,
            loss_alone=alone.loss,
            norm=self._meter.norm(fused.gradients) if fused.gradients else math.nan,
            norm_alone=self._meter.norm(alone.gradients) if alone.gradients else math.nan,
        )


def _losses(outcome: Outcome) -> tuple[float, float]:
    return outcome.loss, outcome.aux_loss


def _words(gap: Gap) -> str:
    return f"{gap.tensor} by {gap.value:.1e}, of which rounding explains {gap.allowed:.1e}"
