"""What a run is going to do, known from its config, its data and the headers of the base model alone."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from moe_peft.adapters import Method
from moe_peft.config import AdapterJob, TrainConfig
from moe_peft.data.dispatcher import Dispatcher, MicroBatch
from moe_peft.data.samples import Sample
from moe_peft.data.tokenizer import Tokenizer, load_tokenizer
from moe_peft.io.base_model import BaseModelShape, read_base_model_shape, without_memory
from moe_peft.model.llama import LlamaForCausalLM
from moe_peft.training.preparation import JobData, JobReader, check_fit


@dataclass(frozen=True, kw_only=True)
class AdapterForecast:
    """One adapter of the run.

    Args:
        job: its settings.
        data: its samples and the plan of its steps.
        num_trainable: its parameters.
        num_router: those of them that route.
        largest: its settings as large as it can become.
        num_largest: its parameters then.
        buffer_bytes: of what it keeps beside them then.
    """

    job: AdapterJob
    data: JobData
    num_trainable: int
    num_router: int
    largest: Method
    num_largest: int
    buffer_bytes: int

    @property
    def num_tokens(self) -> int:
        """Tokens of all its steps."""
        plan = self.data.plan
        lengths = [plan.tokens_of(sample) for sample in plan.samples]
        epochs, rest = divmod(plan.num_steps, plan.steps_per_epoch)
        of_rest = sum(
            micro_batch.num_tokens
            for step in range(plan.num_steps - rest, plan.num_steps)
            for micro_batch in plan.micro_batches(step)
        )
        return epochs * sum(lengths) + of_rest

    @property
    def largest_micro_batch(self) -> int:
        """Tokens that its longest samples would have in one forward."""
        lengths = sorted(map(self.data.plan.tokens_of, self.data.plan.samples), reverse=True)
        return sum(lengths[: self.data.plan.micro_batch_size])

    @property
    def eval_samples(self) -> tuple[Sample, ...]:
        """Its held-out samples."""
        return () if self.data.eval_set is None else self.data.eval_set.samples

    @property
    def num_evaluations(self) -> int:
        """Before the first step, every ``eval_steps``, and after the last."""
        if self.data.eval_set is None:
            return 0
        steps = self.data.plan.num_steps
        return 2 if self.job.eval_steps is None else 1 + -(-steps // self.job.eval_steps)

    @property
    def accumulates(self) -> bool:
        """Whether gradients wait for the step's further micro-batches while a forward runs."""
        return self.job.micro_batch_size is not None and self.job.micro_batch_size < self.job.batch_size

    @property
    def state_bytes(self) -> int:
        """What it holds as long as it trains: weights, the optimizer's state, the last good weights and the best."""
        moments = {"adamw": 2, "sgd": int(self.job.momentum > 0)}[self.job.optimizer]
        return (2 + moments + (self.job.patience is not None)) * self.weight_bytes + self.buffer_bytes

    @property
    def weight_bytes(self) -> int:
        """Of its weights alone at their largest; a gradient has as many."""
        return 4 * self.num_largest


@dataclass(frozen=True)
class FusedStep:
    """One forward and backward of the run.

    Args:
        parts: adapter, optimizer step and micro-batch of each of its parts.
        num_tokens: of all of them.
    """

    parts: tuple[tuple[str, int, int], ...]
    num_tokens: int

    @property
    def names(self) -> frozenset[str]:
        """The adapters in it."""
        return frozenset(name for name, _, _ in self.parts)


@dataclass(frozen=True, kw_only=True)
class RunForecast:
    """The whole run.

    Args:
        config: the run's.
        shape: of the base model.
        num_base: its parameters.
        adapters: one for each of the config's, by name.
        steps: its forwards, in order.
        tokenizer: of the base model.
    """

    config: TrainConfig
    shape: BaseModelShape
    num_base: int
    adapters: Mapping[str, AdapterForecast]
    steps: tuple[FusedStep, ...]
    tokenizer: Tokenizer

    @property
    def base_bytes(self) -> int:
        """Of the frozen weights."""
        return self.num_base * self.shape.dtype.itemsize

    def micro_batches(self, step: FusedStep) -> list[MicroBatch]:
        """What one of the forwards is made of."""
        return [self.adapters[name].data.plan.micro_batches(number)[index] for name, number, index in step.parts]


def forecast_run(config: TrainConfig) -> RunForecast:
    """Read what the run would read, the weights left aside, and play its schedule through.

    Raises:
        FileNotFoundError: when the base model is not there.
        ValueError: on anything for which the run would be refused.
    """
    reader = JobReader(load_tokenizer(config.base_model), config.seed)
    jobs = {job.name: job for job in config.adapters}
    data = {name: reader.read(job) for name, job in jobs.items()}
    shape = read_base_model_shape(config.base_model, config.dtype, config.device)
    for name, own in data.items():
        check_fit(name, own, shape.config, jobs[name].adapter.context_tokens)
    base = shape.empty_model()
    adapters = {}
    counted: dict[Method, tuple[int, int, int]] = {}  # the members of a sweep differ in little that counts
    for job in config.adapters:
        largest = job.adapter.at_largest(data[job.name].plan.num_steps)
        for adapter in (job.adapter, largest):
            if adapter not in counted:
                counted[adapter] = _count(base, job.name, adapter, reader.tokenizer)
        trainable, router, _ = counted[job.adapter]
        num_largest, _, buffers = counted[largest]
        adapters[job.name] = AdapterForecast(
            job=job,
            data=data[job.name],
            num_trainable=trainable,
            num_router=router,
            largest=largest,
            num_largest=num_largest,
            buffer_bytes=buffers,
        )
    return RunForecast(
        config=config,
        shape=shape,
        num_base=sum(weight.numel() for weight in base.parameters()),
        adapters=adapters,
        steps=tuple(fused_steps(adapters, config.max_batch_tokens, config.max_concurrent_adapters)),
        tokenizer=reader.tokenizer,
    )


def _count(base: LlamaForCausalLM, name: str, adapter: Method, tokenizer: Tokenizer) -> tuple[int, int, int]:
    """Parameters of an adapter on this base, those of its routers, and bytes of its buffers."""
    try:
        with without_memory():
            base.add_adapter(name, adapter, tokenizer=tokenizer)
    except ValueError as error:
        raise ValueError(f"adapter {name!r}: {error}") from error
    weights = {
        id(weight): (weight.numel(), adapter.is_router(key)) for key, weight, _ in base.named_adapter_weights(name)
    }
    buffers = sum(buffer.nbytes for buffer in base.adapter_buffers(name).values())
    base.remove_adapter(name)
    sizes = weights.values()
    return sum(size for size, _ in sizes), sum(size for size, routes in sizes if routes), buffers


def fused_steps(
    adapters: Mapping[str, AdapterForecast], max_batch_tokens: int, max_concurrent: int | None
) -> Iterator[FusedStep]:
    """The forwards of a run in which nothing fails and nobody stops, as the dispatcher composes them."""
    dispatcher = Dispatcher({}, max_batch_tokens)
    queue = list(adapters)
    while True:
        while queue and (max_concurrent is None or len(dispatcher.adapters) < max_concurrent):
            name = queue.pop(0)
            dispatcher.add(name, adapters[name].data.plan)
        micro_batches = dispatcher.next_batch()
        if not micro_batches:
            return
        yield FusedStep(
            tuple((part.adapter, part.step, part.index) for part in micro_batches),
            sum(part.num_tokens for part in micro_batches),
        )
        for part in micro_batches:
            if part.adapter not in dispatcher.adapters:
                dispatcher.remove(part.adapter)
