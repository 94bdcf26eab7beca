"""What a run tells at its beginning and at its end: sizes, then losses and how every job ended."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moe_peft.data.tokenizer import Tokenizer
from moe_peft.io.base_model import without_memory
from moe_peft.model.llama import LlamaForCausalLM
from moe_peft.training.display.summary import (
    AdapterResult,
    AdapterSummary,
    AnswerExample,
    closing_report,
    parameters_table,
    print_report,
)
from moe_peft.training.errors import UnfinishedError
from moe_peft.training.job_queue import Job
from moe_peft.training.record import TrainingRecord

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class TrainResult:
    """What a run ends with.

    Args:
        run_dir: the run's folder.
        adapters: one result an adapter, in the config's order; submitted ones behind it.
    """

    run_dir: Path
    adapters: tuple[AdapterResult, ...]


def summaries_of(model: LlamaForCausalLM, jobs: Sequence[Job], tokenizer: Tokenizer) -> list[AdapterSummary]:
    """The sizes of every job's adapter, counted on a twin of the model without weights: most wait in the queue yet."""
    num_base = sum(weight.numel() for weight in model.parameters() if not weight.requires_grad)
    counts: dict[object, int] = {}
    with without_memory():
        twin = LlamaForCausalLM(model.config_)

    def num_trainable(job: Job) -> int:
        config = job.settings.adapter
        if config not in counts:
            with without_memory():
                twin.add_adapter(job.name, config, tokenizer=tokenizer)
            counts[config] = sum(weight.numel() for weight in twin.adapter_parameters(job.name))
            twin.remove_adapter(job.name)
        return counts[config]

    return [
        AdapterSummary(
            name=job.name,
            method=job.settings.method,
            num_trainable=num_trainable(job),
            num_base=num_base,
            num_samples=len(job.data.train_set.samples),
            num_steps=job.data.plan.num_steps,
            num_truncated=job.data.train_set.num_truncated,
            num_skipped=job.data.train_set.num_skipped,
        )
        for job in jobs
    ]


def opening_line(model: LlamaForCausalLM, run_dir: Path) -> str:
    """The base model's size, where it runs, and the run's folder."""
    num_base = sum(weight.numel() for weight in model.parameters() if not weight.requires_grad)
    where = f"{str(model.dtype).removeprefix('torch.')} on {model.device}"
    if model.device.type == "cpu":
        where += f" ({torch.get_num_threads()} threads)"
    return f"{num_base:,} frozen parameters, {where}; run folder {run_dir}"


def print_sizes(console: "Console", model: LlamaForCausalLM, jobs: Sequence[Job], tokenizer: Tokenizer) -> None:
    """The table before training."""
    print_report(console, parameters_table(summaries_of(model, jobs, tokenizer)))


def results_of(
    state: Mapping[str, Any], run_dir: Path, examples: Mapping[str, tuple[AnswerExample, ...]]
) -> tuple[AdapterResult, ...]:
    """Each job's end, from what a checkpoint holds of the run.

    Args:
        state: as ``run_state.state_of`` gives it.
        run_dir: the run's folder.
        examples: answers by adapter name.
    """
    results = []
    for job in state["jobs"]:
        record = TrainingRecord.from_dict(job["record"])
        results.append(
            AdapterResult(
                name=job["name"],
                state=job["state"],
                reason=job["reason"],
                num_steps=record.steps_taken,
                skipped_steps=record.num_skipped,
                seconds=record.seconds,
                eval_loss_before=record.evals[0].eval_loss if record.evals else None,
                eval_loss_after=_loss_of_saved(record),
                saved_to=None if job["saved_to"] is None else run_dir / job["saved_to"],
                examples=examples.get(job["name"], ()),
            )
        )
    refused = [
        AdapterResult(name=refusal["name"], state="refused", reason=refusal["reason"], num_steps=0, seconds=0.0)
        for refusal in state["refusals"]
    ]
    return (*results, *refused)


def _loss_of_saved(record: TrainingRecord) -> float | None:
    """The held-out loss of the saved weights, where they have been evaluated after training."""
    if record.failure is not None or len(record.evals) < 2:
        return None  # a failed adapter has gone back to weights that no evaluation has seen
    kept = record.best_eval or record.evals[-1]
    return kept.eval_loss if record.best_eval is not None or kept.step == record.steps_taken else None


def finish(console: "Console", run_dir: Path, results: tuple[AdapterResult, ...]) -> TrainResult:
    """Print the closing report.

    Raises:
        UnfinishedError: when not every job came to a good end; names each, and why.
    """
    print_report(console, closing_report(results))
    unfinished = [result for result in results if not result.is_finished]
    if unfinished:
        raise UnfinishedError("; ".join(f"adapter {result.name!r}: {result.status}" for result in unfinished))
    return TrainResult(run_dir, results)
