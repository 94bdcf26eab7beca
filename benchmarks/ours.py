"""One training step of ours, made of what `moe_peft.training.Trainer` makes its steps of."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial

import torch
from batches import Batch
from timing import seconds_of

from moe_peft.adapters import METHODS
from moe_peft.config import AdapterJob
from moe_peft.data.dispatcher import MicroBatch, StepPlan
from moe_peft.data.samples import SampleSet
from moe_peft.data.tokenizer import Tokenizer
from moe_peft.model.llama import LlamaForCausalLM
from moe_peft.strict import nearest
from moe_peft.training.adapter_run import AdapterRun
from moe_peft.training.fused_step import run_fused
from moe_peft.training.loss_scale import LossScale


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What is trained in one step.

    Args:
        label: as the user wrote it.
        method: of every adapter.
        num_adapters: that share the step's samples equally.
    """

    label: str
    method: str
    num_adapters: int


def parse_variant(text: str) -> Variant:
    """``lora``, ``mixlora``, or ``4xmixlora`` for four adapters that share the samples.

    Raises:
        ValueError: for any other text.
    """
    match = re.fullmatch(r"(?:([1-9]\d*)x)?(\w+)", text)
    if match is None or match[2] not in METHODS:
        raise ValueError(
            f"the variant {text!r} must be a method ({', '.join(METHODS)}), or several at once, like 4xlora"
            f"{nearest(text, METHODS)}"
        )
    return Variant(label=text, method=match[2], num_adapters=int(match[1] or 1))


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """Of every adapter of a benchmark.

    Args:
        r: rank, of each expert too.
        num_experts: of a mixture.
        top_k: experts a token goes to.
        lora_dropout: in training.
    """

    r: int = 8
    num_experts: int = 8
    top_k: int = 2
    lora_dropout: float = 0.0

    def config(self, method: str) -> object:
        """The method's config, with those of the settings that it has."""
        known = {field.name for field in fields(METHODS[method])}
        wanted = {field.name: getattr(self, field.name) for field in fields(self)} | {"lora_alpha": 2 * self.r}
        return METHODS[method](**{name: value for name, value in wanted.items() if name in known})


class TrainingStep:
    """Forward, backward, clipping and optimizer step of a variant's adapters, as the train command does them.

    Args:
        model: takes the adapters up beside those of other variants, which cost this one nothing.
        variant: the adapters.
        settings: of each.
        batches: step i trains on ``batches[i % len(batches)]``.
        config: of every adapter; None: what ``settings`` make of the variant's method.
        num_steps: of the training that the steps belong to.
        lr: the constant learning rate; None: the train command's.
        tokenizer: for methods that start from a text.

    Raises:
        ValueError: when the adapters cannot share a batch's samples equally.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        variant: Variant,
        settings: AdapterSettings,
        batches: Sequence[Batch],
        *,
        config: object | None = None,
        num_steps: int = 1_000_000,
        lr: float | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        for batch in batches:
            if len(batch.samples) % variant.num_adapters:
                raise ValueError(f"samples={len(batch.samples)} must be a multiple of the adapters of {variant.label}")
        self._model = model.train()
        self._batches = batches
        self.losses: list[float] = []  # of each adapter in the last step
        config = settings.config(variant.method) if config is None else config
        rate = {} if lr is None else {"lr": lr, "lr_scheduler": "constant"}
        self._runs = []
        for number in range(variant.num_adapters):
            name = f"{variant.label}_{number}"
            job = AdapterJob(name=name, method=variant.method, adapter=config, data="none", max_steps=num_steps, **rate)
            self._model.add_adapter(name, config, seed=number, tokenizer=tokenizer)
            self._runs.append(self._new_run(job))

    def _new_run(self, job: AdapterJob) -> AdapterRun:
        samples = self._batches[0].samples
        plan = StepPlan(
            job.name,
            samples,
            batch_size=len(samples),
            micro_batch_size=len(samples),
            num_epochs=1,
            max_steps=job.max_steps,
            seed=0,
        )
        samples_read = SampleSet(
            samples=samples, records=(), num_truncated=0, num_skipped=0, num_tokens=0, num_supervised_tokens=0
        )
        loss_scale = LossScale() if self._model.dtype == torch.float16 else None
        return AdapterRun(job, self._model, plan, samples_read, None, loss_scale)

    @property
    def trainable_per_token(self) -> float:
        """Adapter weights that a token meets: of the experts, only those that it goes to."""
        job = self._runs[0].job
        chosen = job.adapter.top_k / job.adapter.num_experts if job.adapter.has_router else 1.0
        return sum(
            weight.numel() if expert is None else weight[expert].numel() * chosen
            for _, weight, expert in self._model.named_adapter_weights(job.name)
        )

    @property
    def num_trainable(self) -> int:
        """Parameters of one of the adapters."""
        return sum(weight.numel() for weight in self._runs[0].parameters)

    def tokens_of(self, number: int) -> int:
        """Tokens of the step of that number."""
        return self._batches[number % len(self._batches)].num_tokens

    def __call__(self, number: int) -> float:
        """Take the step of that number; returns its seconds."""
        return seconds_of(partial(self._step, number), self._model.device)

    def _step(self, number: int) -> None:
        batch = self._batches[number % len(self._batches)]
        share = len(batch.samples) // len(self._runs)
        micro_batches = [
            _micro_batch(run.job.name, run.steps_taken, Batch(batch.samples[i * share : (i + 1) * share]))
            for i, run in enumerate(self._runs)
        ]
        parameters = {run.job.name: run.parameters for run in self._runs}
        scales = {run.job.name: run.loss_scale.value for run in self._runs if run.loss_scale is not None}
        outcomes = run_fused(self._model, micro_batches, parameters, _refuse_split, scales)
        self.losses = [outcome.loss for outcome in outcomes]
        for run, outcome in zip(self._runs, outcomes, strict=True):
            if not run.take_in(outcome):
                raise RuntimeError(f"adapter {run.job.name}: {outcome.failure}")
        norms = torch.stack([run.gradient_norm() for run in self._runs]).tolist()  # one transfer from a GPU
        for run, outcome, norm in zip(self._runs, outcomes, norms, strict=True):
            row = run.step(outcome.micro_batch, norm)
            if row.skipped is not None:
                raise RuntimeError(f"adapter {run.job.name}: {row.skipped}")


def _micro_batch(name: str, step: int, batch: Batch) -> MicroBatch:
    return MicroBatch(
        adapter=name,
        step=step,
        index=0,
        is_last=True,
        samples=batch.samples,
        step_supervised=batch.num_supervised,
        step_tokens=batch.num_tokens,
    )


def _refuse_split(message: str) -> None:
    raise MemoryError(f"{message}; a benchmark measures whole steps: give it fewer tokens")
