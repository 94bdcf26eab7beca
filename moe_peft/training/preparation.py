"""What a job needs before it can train: its samples, checked against the base model, and the plan of its steps."""

import hashlib
from array import array
from collections.abc import Iterable
from dataclasses import dataclass

from moe_peft.config import AdapterJob, TrainConfig
from moe_peft.data.dispatcher import StepPlan
from moe_peft.data.samples import SampleSet, load_samples
from moe_peft.data.tokenizer import Tokenizer
from moe_peft.model.config import LlamaConfig
from moe_peft.model.llama import LlamaForCausalLM


@dataclass(frozen=True)
class JobData:
    """What a job learns from.

    Args:
        train_set: its training samples.
        eval_set: its held-out samples, if it has any.
        plan: what it learns from at each step.
        seed: of its init, its shuffling and its dropout.
        fingerprint: of every token and label; it tells data that has changed.
    """

    train_set: SampleSet
    eval_set: SampleSet | None
    plan: StepPlan
    seed: int
    fingerprint: str


class JobReader:
    """Reads the data of jobs; what several of them share, such as the members of a sweep, it reads once.

    Args:
        tokenizer: of the base model.
        seed: of the jobs that have none of their own.
    """

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self.tokenizer = tokenizer
        self._seed = seed
        self._read_before: dict[tuple[object, ...], tuple[SampleSet, str]] = {}

    def read(self, job: AdapterJob) -> JobData:
        """A job's samples and plan.

        Raises:
            ValueError: naming the adapter, when its data is missing or bad, or its settings do not go with it.
        """
        try:
            train_set, digest = self._samples(job.data, job)
            eval_set, eval_digest = self._samples(job.eval_data, job) if job.eval_data is not None else (None, "")
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"adapter {job.name!r}: {error}") from error
        seed = self._seed if job.seed is None else job.seed
        plan = StepPlan(
            job.name,
            train_set.samples,
            batch_size=job.batch_size,
            micro_batch_size=job.micro_batch_size or job.batch_size,
            num_epochs=job.num_epochs,
            max_steps=job.max_steps,
            seed=seed,
            inserted_tokens=job.adapter.inserted_tokens,
        )
        if job.warmup_steps >= plan.num_steps:
            raise ValueError(
                f"adapter {job.name!r}: warmup_steps={job.warmup_steps} must be below its {plan.num_steps} steps"
            )
        return JobData(train_set, eval_set, plan, seed, digest + eval_digest)

    def _samples(self, data: str, job: AdapterJob) -> tuple[SampleSet, str]:
        """The samples and their fingerprint."""
        key = (data, job.template, job.cutoff_len, job.overlong)
        if key not in self._read_before:
            sample_set = load_samples(
                data, self.tokenizer, template=job.template, cutoff_len=job.cutoff_len, overlong=job.overlong
            )
            self._read_before[key] = sample_set, _fingerprint(sample_set)
        return self._read_before[key]


def _fingerprint(sample_set: SampleSet) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for sample in sample_set.samples:
        # The length keeps the ends of samples apart.
        digest.update(array("q", (len(sample.input_ids), *sample.input_ids, *sample.labels)))
    return digest.hexdigest()


def check_loaded(model: LlamaForCausalLM, config: TrainConfig) -> None:
    """Refuses a base model that is loaded otherwise than the config has it.

    Raises:
        ValueError: naming the key.
    """
    dtype = str(model.dtype).removeprefix("torch.")
    if config.dtype not in ("auto", dtype):
        raise ValueError(f"dtype={config.dtype!r} is not that of the base model, which is loaded in {dtype}")
    kind, _, index = config.device.partition(":")
    if kind not in ("auto", model.device.type) or (index and int(index) != (model.device.index or 0)):
        raise ValueError(f"device={config.device!r} is not that of the base model, which lies on {model.device}")


def check_fit(name: str, data: JobData, shape: LlamaConfig, context_tokens: int = 0) -> None:
    """Refuses samples that are not for this base model.

    Args:
        name: the adapter's.
        data: its samples.
        shape: of the base model.
        context_tokens: virtual tokens that the adapter puts before each sample.

    Raises:
        ValueError: naming the adapter.
    """
    sets: Iterable[SampleSet] = filter(None, (data.train_set, data.eval_set))
    for sample_set in sets:
        longest = max(len(sample.input_ids) for sample in sample_set.samples)
        if shape.context_limit is not None and longest + context_tokens > shape.context_limit:
            virtual = f" and {context_tokens} virtual ones before it" if context_tokens else ""
            raise ValueError(
                f"adapter {name!r}: a sample of {longest} tokens{virtual} is longer than the {shape.context_limit} for "
                f"which the base model is made (max_position_embeddings={shape.max_position_embeddings}); "
                "lower cutoff_len"
            )
        largest = max(max(sample.input_ids) for sample in sample_set.samples)
        if largest >= shape.vocab_size:
            raise ValueError(
                f"adapter {name!r}: the tokenizer gives token {largest}, but the base model's "
                f"vocab_size={shape.vocab_size}: they do not belong together"
            )
