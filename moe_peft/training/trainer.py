"""A training run from its config to the saved adapters."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from moe_peft.config import AdapterJob, TrainConfig
from moe_peft.data.dispatcher import Dispatcher, MicroBatch, StepPlan
from moe_peft.data.samples import SampleSet, load_samples
from moe_peft.data.tokenizer import load_tokenizer
from moe_peft.io.base_model import load_base_model
from moe_peft.training.adapter_run import AdapterRun
from moe_peft.training.answers import answer_held_out_prompts
from moe_peft.training.errors import TrainingError
from moe_peft.training.evaluation import evaluate
from moe_peft.training.fused_step import run_fused
from moe_peft.training.interrupt import InterruptGuard
from moe_peft.training.loss_scale import LossScale
from moe_peft.training.metrics import EvalMetrics, MetricsWriter
from moe_peft.training.progress import Progress
from moe_peft.training.run_folder import RunFolder, check_output_dir
from moe_peft.training.summary import (
    AdapterResult,
    AdapterSummary,
    AnswerExample,
    closing_report,
    parameters_table,
    print_report,
)

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class TrainResult:
    """What a run ends with.

    Args:
        run_dir: the run's folder.
        adapters: one result an adapter, in the config's order.
    """

    run_dir: Path
    adapters: tuple[AdapterResult, ...]


class Trainer:
    """Trains the adapters of a config together on one frozen base.

    The constructor reads and checks everything the user gave and writes nothing.

    Args:
        config: the run.
        console: where progress and reports go; None: standard output.

    Raises:
        ValueError: on anything wrong with the data, the base model or how they fit together.
    """

    def __init__(self, config: TrainConfig, *, console: "Console | None" = None) -> None:
        from rich.console import Console

        self.config = config
        self.console = console or Console()
        check_output_dir(config.output_dir)
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        # Data before weights: a typo in a path shows in a second.
        self.tokenizer = load_tokenizer(config.base_model)
        sets = {job.name: self._read_samples(job) for job in config.adapters}
        self._say(f"Loading the base model {config.base_model}")
        self.model = load_base_model(config.base_model, dtype=config.dtype, device=config.device)
        self.model.activation_checkpointing_ = config.activation_checkpointing
        if self.model.dtype == torch.float16 and self.model.device.type == "cpu":
            self._say("Warning: CPUs multiply float16 matrices very slowly; dtype bfloat16 or float32 is far faster")
        self._check_fit(sets)
        self.runs = {job.name: self._new_run(job, *sets[job.name]) for job in config.adapters}
        self.dispatcher = Dispatcher({name: run.plan for name, run in self.runs.items()}, config.max_batch_tokens)

    def _read_samples(self, job: AdapterJob) -> tuple[SampleSet, SampleSet | None]:
        def read(data: str) -> SampleSet:
            return load_samples(
                data, self.tokenizer, template=job.template, cutoff_len=job.cutoff_len, overlong=job.overlong
            )

        try:
            return read(job.data), read(job.eval_data) if job.eval_data is not None else None
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"adapter {job.name!r}: {error}") from error

    def _check_fit(self, sets: dict[str, tuple[SampleSet, SampleSet | None]]) -> None:
        shape = self.model.config_
        for name, pair in sets.items():
            for sample_set in filter(None, pair):
                longest = max(len(sample.input_ids) for sample in sample_set.samples)
                if shape.context_limit is not None and longest > shape.context_limit:
                    raise ValueError(
                        f"adapter {name!r}: a sample of {longest} tokens is longer than the {shape.context_limit} for "
                        f"which the base model is made (max_position_embeddings={shape.max_position_embeddings}); "
                        "lower cutoff_len"
                    )
                largest = max(max(sample.input_ids) for sample in sample_set.samples)
                if largest >= shape.vocab_size:
                    raise ValueError(
                        f"adapter {name!r}: the tokenizer gives token {largest}, but the base model's "
                        f"vocab_size={shape.vocab_size}: they do not belong together"
                    )

    def _new_run(self, job: AdapterJob, train_set: SampleSet, eval_set: SampleSet | None) -> AdapterRun:
        seed = self.config.seed if job.seed is None else job.seed
        try:
            self.model.add_adapter(job.name, job.adapter, seed=seed)
        except ValueError as error:
            raise ValueError(f"adapter {job.name!r}: {error}") from error
        plan = StepPlan(
            job.name,
            train_set.samples,
            batch_size=job.batch_size,
            micro_batch_size=job.micro_batch_size or job.batch_size,
            num_epochs=job.num_epochs,
            max_steps=job.max_steps,
            seed=seed,
        )
        if job.warmup_steps >= plan.num_steps:
            raise ValueError(
                f"adapter {job.name!r}: warmup_steps={job.warmup_steps} must be below its {plan.num_steps} steps"
            )
        loss_scale = LossScale() if self.model.dtype == torch.float16 else None
        return AdapterRun(job, self.model, plan, train_set, eval_set, loss_scale)

    def train(self) -> TrainResult:
        """Run to the end, saving every adapter as it finishes.

        Returns:
            The run's folder and each adapter's result.

        Raises:
            TrainingError: when an adapter's loss or gradient stopped being finite. The others have finished and are
                saved; so is the failed one, with its last good weights.
            KeyboardInterrupt: on Ctrl-C, after the step in hand has been finished and every adapter saved.
        """
        chosen = {"dtype": str(self.model.dtype).removeprefix("torch."), "device": str(self.model.device)}
        folder = RunFolder(TrainConfig.from_dict({**self.config.to_dict(), **chosen}))
        self._announce(folder)
        num_steps = {name: run.plan.num_steps for name, run in self.runs.items()}
        with InterruptGuard() as guard, MetricsWriter(folder.metrics) as metrics:
            try:
                with Progress(num_steps, self.console) as progress:
                    self._loop(folder, guard, metrics, progress)
            except BaseException:
                # A second Ctrl-C or an error of ours: what was learnt is kept, and that error stays the news.
                self._keep_and_tell(folder)
                raise
            if guard.signal is not None:
                unsaved = self._keep_and_tell(folder)
                if not unsaved:
                    guard.raise_if_asked()
                raise TrainingError("; ".join(unsaved))
        try:
            return self._close(folder)
        except KeyboardInterrupt:
            self._keep_and_tell(folder)
            raise

    def _keep_and_tell(self, folder: RunFolder) -> list[str]:
        """Save and draw what there is at an early end, and say where.

        Returns:
            What could not be saved, and why.
        """
        unsaved = self._save_rest(folder)
        self._say("Stopped early; every adapter is saved as it stands:")
        for path in folder.saved.values():
            self._say(f"  {path}")
        for reason in unsaved:
            self._say(reason)
        self._draw(folder)
        return unsaved

    def _draw(self, folder: RunFolder) -> None:
        try:
            folder.draw(list(self.runs.values()))
        except Exception as error:  # pictures are worth no run
            self._say(f"the pictures could not be drawn: {error}")

    def _save_rest(self, folder: RunFolder) -> list[str]:
        """Save every adapter that has not finished.

        Returns:
            What could not be saved, and why: after a failure (a full disk, say) a smaller adapter may still fit.
        """
        unsaved = []
        for run in self.runs.values():
            if run.job.name not in folder.saved:
                try:
                    folder.save(self.model, run)
                except Exception as error:
                    unsaved.append(f"adapter {run.job.name!r} could not be saved: {error}")
        return unsaved

    def _say(self, text: str) -> None:
        # As it is: a path may hold what rich would read as markup.
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _announce(self, folder: RunFolder) -> None:
        num_base = sum(weight.numel() for weight in self.model.parameters() if not weight.requires_grad)
        summaries = [
            AdapterSummary(
                name=name,
                method=run.job.method,
                num_trainable=sum(weight.numel() for weight in run.parameters),
                num_base=num_base,
                num_samples=len(run.train_set.samples),
                num_steps=run.plan.num_steps,
                num_truncated=run.train_set.num_truncated,
                num_skipped=run.train_set.num_skipped,
            )
            for name, run in self.runs.items()
        ]
        where = f"{str(self.model.dtype).removeprefix('torch.')} on {self.model.device}"
        if self.model.device.type == "cpu":
            where += f" ({torch.get_num_threads()} threads)"
        self._say(f"{num_base:,} frozen parameters, {where}; run folder {folder.path}")
        print_report(self.console, parameters_table(summaries))

    def _loop(self, folder: RunFolder, guard: InterruptGuard, metrics: MetricsWriter, progress: Progress) -> None:
        runs = list(self.runs.values())
        self._evaluate(runs, metrics, progress)
        self._retire(runs, folder, progress)
        self.model.train()
        while guard.signal is None and (micro_batches := self.dispatcher.next_batch()):
            stepped = self._step(micro_batches, metrics, progress)
            self._evaluate([run for run in stepped if self._is_evaluation_due(run)], metrics, progress)
            self._retire([self.runs[micro_batch.adapter] for micro_batch in micro_batches], folder, progress)

    def _retire(self, runs: Sequence[AdapterRun], folder: RunFolder, progress: Progress) -> None:
        """Save and take out the adapters that have reached their end, a good one or a bad one."""
        for run in runs:
            if not run.is_active:
                self.dispatcher.remove(run.job.name)
                folder.save(self.model, run)
                progress.done(run.job.name, run.status)

    def _step(
        self, micro_batches: Sequence[MicroBatch], metrics: MetricsWriter, progress: Progress
    ) -> list[AdapterRun]:
        """One fused forward and backward, and the optimizer step of each adapter whose last micro-batch this was.

        Returns:
            The adapters that took an optimizer step.
        """
        runs = [self.runs[micro_batch.adapter] for micro_batch in micro_batches]
        for run in runs:
            run.start_clock()
        parameters = {run.job.name: run.parameters for run in runs}
        scales = {run.job.name: run.loss_scale.value for run in runs if run.loss_scale is not None}
        ready = []
        for outcome in run_fused(self.model, micro_batches, parameters, progress.message, scales):
            run = self.runs[outcome.micro_batch.adapter]
            if run.failure is None and run.take_in(outcome) and outcome.micro_batch.is_last:
                ready.append((run, outcome.micro_batch))
        if not ready:
            return []
        norms = torch.stack([run.gradient_norm() for run, _ in ready]).tolist()  # one transfer from a GPU
        stepped = []
        for (run, micro_batch), norm in zip(ready, norms, strict=True):
            row = run.step(micro_batch, norm)
            if row is not None:
                metrics.write(row)
                progress.step(row)
                stepped.append(run)
        return stepped

    def _is_evaluation_due(self, run: AdapterRun) -> bool:
        if run.eval_set is None:
            return False
        every = run.job.eval_steps
        return not run.is_active or (every is not None and run.steps_taken % every == 0)

    def _evaluate(self, runs: Sequence[AdapterRun], metrics: MetricsWriter, progress: Progress) -> None:
        held_out = {run.job.name: run.eval_set.samples for run in runs if run.eval_set is not None}
        if not held_out:
            return
        for run in self.runs.values():
            run.stop_clock()
        for name, (loss, count) in evaluate(self.model, held_out, self.config.max_batch_tokens).items():
            run = self.runs[name]
            row = EvalMetrics(adapter=name, step=run.steps_taken, eval_loss=loss, num_supervised_tokens=count)
            run.record(row)
            metrics.write(row)
            progress.eval(row)

    def _close(self, folder: RunFolder) -> TrainResult:
        self._draw(folder)
        runs = list(self.runs.values())
        answers: dict[str, tuple[AnswerExample, ...]] = {}
        try:
            answers = answer_held_out_prompts(self.model, self.tokenizer, runs, self.config.answer_examples)
        except (ValueError, RuntimeError) as error:  # out of memory, say: the report below is worth more
            self._say(f"no prompts were answered: {error}")
        results = tuple(
            AdapterResult(
                name=name,
                status=run.status,
                num_steps=run.steps_taken,
                skipped_steps=run.loss_scale.num_skipped if run.loss_scale is not None else 0,
                seconds=run.seconds,
                eval_loss_before=run.evals[0].eval_loss if run.evals else None,
                # A failed adapter has gone back to weights that no evaluation has seen.
                eval_loss_after=run.evals[-1].eval_loss if len(run.evals) > 1 and run.failure is None else None,
                saved_to=folder.saved[name],
                examples=answers.get(name, ()),
            )
            for name, run in self.runs.items()
        )
        print_report(self.console, closing_report(results))
        failed = [run for run in runs if run.failure is not None]
        if failed:
            reasons = "; ".join(f"adapter {run.job.name!r}: {run.failure}" for run in failed)
            raise TrainingError(reasons)
        return TrainResult(folder.path, results)
