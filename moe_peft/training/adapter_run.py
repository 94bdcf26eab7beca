"""One adapter while it trains: what it accumulates over a step, the step itself, and which of its weights are kept."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from moe_peft.adapters import Updates
from moe_peft.config import AdapterJob
from moe_peft.data.dispatcher import MicroBatch, StepPlan
from moe_peft.data.samples import SampleSet
from moe_peft.model.llama import LlamaForCausalLM
from moe_peft.training.folder.metrics import EvalMetrics, ExpertMetrics, StepMetrics
from moe_peft.training.fused_step import Outcome
from moe_peft.training.loss_scale import LossScale
from moe_peft.training.optimizer import build_optimizer, learning_rate, set_learning_rate
from moe_peft.training.record import TrainingRecord

EXPERT_ROW_STEPS = 10  # optimizer steps between two rows of expert counts


class Ending(NamedTuple):
    """How a job ended: one of the states of ``metrics.JOB_STATES``, and why where the state alone does not say it."""

    state: str
    reason: str | None = None


@dataclass
class AdapterRun:
    """An adapter's training while its weights are on the model.

    Args:
        job: its settings.
        model: the model that carries it.
        plan: what it learns from at each step.
        train_set: its training samples.
        eval_set: its held-out samples, if it has any.
        loss_scale: of its gradients; None where the base model's dtype needs none.
        record: what its training has come to.
    """

    job: AdapterJob
    model: LlamaForCausalLM
    plan: StepPlan
    train_set: SampleSet
    eval_set: SampleSet | None
    loss_scale: LossScale | None = None
    record: TrainingRecord = field(default_factory=TrainingRecord)
    recent_counts: Tensor | None = None  # of the experts, since the last row; on the device
    _step_start: float = 0.0

    def __post_init__(self) -> None:
        self.parameters = self.model.adapter_parameters(self.job.name)
        # Fused optimizers go through weights and gradients in the order of memory, whatever the strides say.
        assert all(weight.is_contiguous() for weight in self.parameters), "weights must lie row by row"
        self.optimizer = build_optimizer(self.model, self.job)
        adapter, name = self.job.adapter, self.job.name
        self.updates: Updates | None = adapter.updates(self.model, name, self.plan.num_steps)
        # What else changes: masks and the like belong to the weights beside which they stood.
        self.buffers = dict(adapter.saved_buffers(self.model, name)) if self.updates is not None else {}
        # The last weights known to be good: a step that ruins them shows in the next loss, when they are gone.
        self.good_weights = [weight.detach().clone() for weight in self.parameters]
        self.good_buffers = _copies(self.buffers)
        self.best_weights: list[Tensor] | None = None  # of the best evaluation, under a patience
        self.best_buffers: dict[str, Tensor] = {}

    @property
    def steps_taken(self) -> int:
        """Optimizer steps so far."""
        return self.record.steps_taken

    @property
    def failure(self) -> str | None:
        """What ended it badly."""
        return self.record.failure

    @property
    def ending(self) -> Ending | None:
        """How it has ended; None while there are steps left to take."""
        record = self.record
        if record.failure is not None:
            return Ending("failed", record.failure)
        best = record.best_eval
        kept = None if best is None else f"the weights of step {best.step}, the best by eval_loss, are kept"
        if record.steps_taken == self.plan.num_steps:
            return Ending("done", kept if best is not None and best.step < record.steps_taken else None)
        if self.job.patience is not None and record.evals_since_best >= self.job.patience:
            return Ending("early-stopped", f"no better eval_loss in {record.evals_since_best} evaluations; {kept}")
        return None

    @property
    def is_active(self) -> bool:
        """Whether there are steps left to take."""
        return self.ending is None

    def take_in(self, outcome: Outcome) -> bool:
        """Add a micro-batch's gradients to the step's.

        Returns:
            False when the step cannot be taken any more. Its other micro-batches run all the same, so that the forwards
            of its neighbours hold what they would hold without the fault.
        """
        record = self.record
        record.loss += outcome.loss
        record.aux_loss += outcome.aux_loss
        if outcome.failure is not None and record.fault is None:
            record.fault = outcome.failure
            if outcome.is_fatal:
                self._fail(outcome.failure)
        if record.fault is not None:
            self.optimizer.zero_grad(set_to_none=True)
            return False
        for weight, gradient in zip(self.parameters, outcome.gradients, strict=True):
            if gradient is not None:
                # Contiguous as the weights are: fused optimizers read both in the order of memory.
                weight.grad = gradient.contiguous() if weight.grad is None else weight.grad.add_(gradient)
        if outcome.router_logits is not None:
            counts = self.job.adapter.expert_counts(outcome.router_logits)
            self.recent_counts = counts if self.recent_counts is None else self.recent_counts + counts
        return True

    def gradient_norm(self) -> Tensor:
        """2-norm of the step's gradient, still on the device."""
        grads = self._gradients()
        return torch.nn.utils.get_total_norm(grads) if grads else self.parameters[0].new_zeros(())

    def step(self, micro_batch: MicroBatch, grad_norm: float | None = None) -> StepMetrics:
        """Clip, step and clear after the last micro-batch of a step.

        A step with a loss or gradient that is not finite is skipped: data and schedule go on, weights and optimizer
        state stay. Too many of those in a row are the adapter's failure; overflows under a loss scale, which shrinks
        until they end, do not count among them.

        Args:
            micro_batch: the last one.
            grad_norm: what ``gradient_norm`` gave, where it has been fetched already.

        Returns:
            The step's row.
        """
        record = self.record
        if record.fault is not None:
            grad_norm = math.nan
        elif grad_norm is None:
            grad_norm = float(self.gradient_norm())
        rate = learning_rate(self.job, micro_batch.step, self.plan.num_steps)
        scale = self.loss_scale.value if self.loss_scale is not None else None
        skipped = self._fault_of(grad_norm, scale)
        if skipped is None:
            self._update_weights(grad_norm, rate)
            record.num_bad = 0
        else:
            record.num_skipped += 1
        self.optimizer.zero_grad(set_to_none=True)
        record.steps_taken += 1
        # Weights that end on bad steps are good only where a last evaluation will show it.
        is_last_word = record.steps_taken == self.plan.num_steps and self.eval_set is None
        if skipped is not None and (record.num_bad >= self.job.max_bad_steps or (record.num_bad and is_last_word)):
            self._fail(skipped)
        now = time.perf_counter()
        seconds = now - self._step_start
        self._step_start = now
        record.seconds += seconds
        row = StepMetrics(
            adapter=self.job.name,
            step=record.steps_taken,
            num_steps=self.plan.num_steps,
            epoch=record.steps_taken / self.plan.steps_per_epoch,
            loss=record.loss,
            aux_loss=record.aux_loss,
            lr=rate,
            grad_norm=grad_norm,
            loss_scale=scale,
            skipped_steps=record.num_skipped if record.num_skipped or scale is not None else None,
            skipped=skipped,
            num_supervised_tokens=micro_batch.step_supervised,
            num_tokens=micro_batch.step_tokens,
            seconds=seconds,
            tokens_per_second=micro_batch.step_supervised / max(seconds, 1e-9),
        )
        record.loss = record.aux_loss = 0.0
        record.fault = None
        return row

    def _fault_of(self, grad_norm: float, scale: float | None) -> str | None:
        """Why the step is skipped; None when it is taken."""
        if self.record.fault is None and math.isfinite(grad_norm):
            return None
        if self.record.fault is None and self.loss_scale is not None and self.loss_scale.back_off():
            return f"gradient norm {grad_norm} at loss_scale={scale:g}, which is halved"
        self.record.num_bad += 1
        where = "" if scale is None else f" at loss_scale={scale:g}, the smallest,"
        return self.record.fault or f"gradient norm {grad_norm}{where} must be finite"

    def _gradients(self) -> list[Tensor]:
        return [weight.grad for weight in self.parameters if weight.grad is not None]

    def _update_weights(self, grad_norm: float, rate: float) -> None:
        if self.job.max_grad_norm is not None and grad_norm > self.job.max_grad_norm:
            torch._foreach_mul_(self._gradients(), self.job.max_grad_norm / grad_norm)
        set_learning_rate(self.optimizer, rate)
        # They have just given a finite loss and gradient.
        torch._foreach_copy_(self.good_weights, [weight.detach() for weight in self.parameters])
        self.good_buffers = _copies(self.buffers)
        self.record.good_step = self.record.steps_taken
        self.optimizer.step()
        if self.updates is not None:
            self.updates.after_step(self.record.steps_taken + 1)
            self._follow_growth()
        if self.loss_scale is not None:
            self.loss_scale.grow()

    def _follow_growth(self) -> None:
        """Where a weight has grown, what goes with it grows: moments by zeros, kept weights as the weight itself did.

        So these act as they did before, and what they grew by can learn, too, whichever of them is saved.
        """
        for i, weight in enumerate(self.parameters):
            shape = self.good_weights[i].shape
            if weight.shape == shape:
                continue
            self.good_weights[i] = _padded(self.good_weights[i], weight.detach())
            if self.best_weights is not None:
                self.best_weights[i] = _padded(self.best_weights[i], weight.detach())
            state = self.optimizer.state[weight]
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == shape:
                    state[key] = _padded(value, value.new_zeros(weight.shape))

    def start_clock(self) -> None:
        """A forward begins: a step's time runs from its first forward, or from the end of the step before."""
        self._step_start = self._step_start or time.perf_counter()

    def stop_clock(self) -> None:
        """What comes until the next forward (an evaluation, say) is not the step's time."""
        self._step_start = 0.0

    def take_evaluation(self, evaluation: EvalMetrics) -> None:
        """Take in a held-out loss; one that is not finite ends the adapter."""
        record = self.record
        record.evals.append(evaluation)
        if not math.isfinite(evaluation.eval_loss):
            self._fail(f"eval_loss={evaluation.eval_loss} must be finite")
        elif self.job.patience is not None:
            best = record.best_eval
            if best is None or evaluation.eval_loss < best.eval_loss - self.job.min_delta:
                record.best = len(record.evals) - 1
                self.best_weights = [weight.detach().clone() for weight in self.parameters]
                self.best_buffers = _copies(self.buffers)

    def take_expert_counts(self) -> ExpertMetrics | None:
        """The row of the tokens that the experts got since the last one; None when they got none."""
        if self.recent_counts is None:
            return None
        counts = self.recent_counts.tolist()
        self.recent_counts = None
        self.record.count_experts(counts)
        layers = tuple(tuple(layer) for layer in counts)
        return ExpertMetrics(adapter=self.job.name, step=self.record.steps_taken, counts=layers)

    def settle(self) -> None:
        """Make the weights those to be kept.

        They are the best by eval_loss under a ``patience``, else the last; those of an adapter that failed become the
        last that gave a finite loss.
        """
        weights = [weight.detach() for weight in self.parameters]
        if self.record.failure is None:
            if self.best_weights is not None:
                torch._foreach_copy_(weights, self.best_weights)
                self._put_back(self.best_buffers)
            norm = float(torch.nn.utils.get_total_norm(weights))
            if not math.isfinite(norm):
                self._fail(f"the norm of the weights, {norm}, must be finite")
        if self.record.failure is not None:
            torch._foreach_copy_(weights, self.good_weights)
            self._put_back(self.good_buffers)
            self.optimizer.zero_grad(set_to_none=True)

    def _put_back(self, kept: Mapping[str, Tensor]) -> None:
        for key, value in kept.items():
            self.buffers[key].data = value.clone()

    def _fail(self, what: str) -> None:
        if self.record.failure is not None:
            return  # the first cause is the news
        after, kept = self.record.steps_taken, self.record.good_step
        self.record.failure = f"{what} (after optimizer step {after}; the weights of step {kept} are kept)"


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.detach().clone() for key, tensor in tensors.items()}


def _padded(tensor: Tensor, filler: Tensor) -> Tensor:
    """A larger tensor with this one at its beginning, and what another has there behind."""
    larger = filler.clone()
    larger[tuple(slice(size) for size in tensor.shape)] = tensor
    return larger
