"""One adapter on its way through a run: what it accumulates over a step, and the step itself."""

import math
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_peft.config import AdapterJob
from moe_peft.data.dispatcher import MicroBatch, StepPlan
from moe_peft.data.samples import SampleSet
from moe_peft.model.llama import LlamaForCausalLM
from moe_peft.training.fused_step import Outcome
from moe_peft.training.loss_scale import LossScale
from moe_peft.training.metrics import EvalMetrics, StepMetrics
from moe_peft.training.optimizer import build_optimizer, learning_rate


@dataclass
class _StepSums:
    """What the micro-batches of the current optimizer step have added up to."""

    loss: float = 0.0
    aux_loss: float = 0.0


@dataclass
class AdapterRun:
    """State of one adapter's training.

    Args:
        job: its settings.
        model: the model that carries it.
        plan: what it learns from at each step.
        train_set: its training samples.
        eval_set: its held-out samples, if it has any.
        loss_scale: of its gradients; None where the base model's dtype needs none.
    """

    job: AdapterJob
    model: LlamaForCausalLM
    plan: StepPlan
    train_set: SampleSet
    eval_set: SampleSet | None
    loss_scale: LossScale | None = None
    steps_taken: int = 0
    failure: str | None = None
    evals: list[EvalMetrics] = field(default_factory=list)
    expert_counts: Tensor | None = None
    seconds: float = 0.0
    _sums: _StepSums = field(default_factory=_StepSums)
    _step_start: float = 0.0

    def __post_init__(self) -> None:
        self.parameters = self.model.adapter_parameters(self.job.name)
        self.optimizer = build_optimizer(self.model, self.job)
        # The last weights known to be good: a step that ruins them shows in the next loss, when they are gone.
        self._good_weights = [weight.detach().clone() for weight in self.parameters]
        self._good_step = 0

    @property
    def is_active(self) -> bool:
        """Whether there are steps left to take."""
        return self.failure is None and self.steps_taken < self.plan.num_steps

    @property
    def status(self) -> str:
        """``done``, or what ended it."""
        if self.failure is not None:
            return f"failed: {self.failure}"
        return "done" if self.steps_taken == self.plan.num_steps else "interrupted"

    def take_in(self, outcome: Outcome) -> bool:
        """Add a micro-batch's gradients to the step's; False when it failed, and the adapter with it."""
        if outcome.failure is not None:
            self._fail(outcome.failure)
            return False
        self._sums.loss += outcome.loss
        self._sums.aux_loss += outcome.aux_loss
        for weight, gradient in zip(self.parameters, outcome.gradients, strict=True):
            if gradient is not None:
                # Contiguous as the weights are: fused optimizers read both in the order of memory.
                weight.grad = gradient.contiguous() if weight.grad is None else weight.grad.add_(gradient)
        if outcome.router_logits is not None:
            counts = self.job.adapter.expert_counts(outcome.router_logits)
            self.expert_counts = counts if self.expert_counts is None else self.expert_counts + counts
        return True

    def gradient_norm(self) -> Tensor:
        """2-norm of the step's gradient, still on the device."""
        grads = self._gradients()
        return torch.nn.utils.get_total_norm(grads) if grads else self.parameters[0].new_zeros(())

    def step(self, micro_batch: MicroBatch, grad_norm: float | None = None) -> StepMetrics | None:
        """Clip, step and clear after the last micro-batch of a step.

        A step whose gradient overflowed under a loss scale is left out. It counts all the same: data and schedule go
        on, weights and optimizer state stay.

        Args:
            micro_batch: the last one.
            grad_norm: what ``gradient_norm`` gave, where it has been fetched already.

        Returns:
            The step's row; None when the adapter failed.
        """
        if grad_norm is None:
            grad_norm = float(self.gradient_norm())
        rate = learning_rate(self.job, micro_batch.step, self.plan.num_steps)
        scale = self.loss_scale.value if self.loss_scale is not None else None
        if math.isfinite(grad_norm):
            self._update_weights(grad_norm, rate)
        elif self.loss_scale is None or not self.loss_scale.back_off():
            where = "" if scale is None else f" at loss_scale={scale:g}, the smallest,"
            self._fail(f"gradient norm {grad_norm}{where} must be finite")
            return None
        self.optimizer.zero_grad(set_to_none=True)
        self.steps_taken += 1
        now = time.perf_counter()
        seconds = now - self._step_start
        self._step_start = now
        self.seconds += seconds
        sums, self._sums = self._sums, _StepSums()
        return StepMetrics(
            adapter=self.job.name,
            step=self.steps_taken,
            num_steps=self.plan.num_steps,
            epoch=self.steps_taken / self.plan.steps_per_epoch,
            loss=sums.loss,
            aux_loss=sums.aux_loss,
            lr=rate,
            grad_norm=grad_norm,
            loss_scale=scale,
            skipped_steps=self.loss_scale.num_skipped if self.loss_scale is not None else None,
            num_supervised_tokens=micro_batch.step_supervised,
            num_tokens=micro_batch.step_tokens,
            seconds=seconds,
            tokens_per_second=micro_batch.step_supervised / max(seconds, 1e-9),
        )

    def _gradients(self) -> list[Tensor]:
        return [weight.grad for weight in self.parameters if weight.grad is not None]

    def _update_weights(self, grad_norm: float, rate: float) -> None:
        if self.job.max_grad_norm is not None and grad_norm > self.job.max_grad_norm:
            torch._foreach_mul_(self._gradients(), self.job.max_grad_norm / grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # They have just given a finite loss and gradient.
        torch._foreach_copy_(self._good_weights, [weight.detach() for weight in self.parameters])
        self._good_step = self.steps_taken
        self.optimizer.step()
        if self.loss_scale is not None:
            self.loss_scale.grow()

    def start_clock(self) -> None:
        """A forward begins: a step's time runs from its first forward, or from the end of the step before."""
        self._step_start = self._step_start or time.perf_counter()

    def stop_clock(self) -> None:
        """What comes until the next forward (an evaluation, say) is not the step's time."""
        self._step_start = 0.0

    def record(self, evaluation: EvalMetrics) -> None:
        """Take in a held-out loss; one that is not finite ends the adapter."""
        self.evals.append(evaluation)
        if not math.isfinite(evaluation.eval_loss):
            self._fail(f"eval_loss={evaluation.eval_loss} must be finite")

    def settle(self) -> None:
        """Make the weights fit to be kept: those of an adapter that failed become the last that gave a finite loss."""
        weights = [weight.detach() for weight in self.parameters]
        norm = float(torch.nn.utils.get_total_norm(weights))
        if self.failure is None and not math.isfinite(norm):
            self._fail(f"the norm of the weights, {norm}, must be finite")
        if self.failure is not None:
            torch._foreach_copy_(weights, self._good_weights)
            self.optimizer.zero_grad(set_to_none=True)

    def _fail(self, what: str) -> None:
        self.failure = (
            f"{what} (after optimizer step {self.steps_taken}; the weights of step {self._good_step} are kept)"
        )
