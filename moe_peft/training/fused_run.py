"""The adapters of a run on their way together: admitted, stepped, evaluated and retired, one fused step at a time."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from moe_peft.config import AdapterJob, TrainConfig
from moe_peft.data.dispatcher import Dispatcher, MicroBatch
from moe_peft.model.llama import LlamaForCausalLM
from moe_peft.training.adapter_run import EXPERT_ROW_STEPS, AdapterRun, Ending
from moe_peft.training.adapter_tensors import restore_tensors, tensors_of
from moe_peft.training.evaluation import evaluate
from moe_peft.training.folder.metrics import EvalMetrics, JobMetrics, Listener, Row
from moe_peft.training.folder.run_folder import RunFolder
from moe_peft.training.fused_step import run_fused
from moe_peft.training.halving import Decision, Halving
from moe_peft.training.job_queue import Job, JobQueue, Refusal
from moe_peft.training.loss_scale import LossScale
from moe_peft.training.preparation import JobReader, check_fit


class FusedRun:
    """The state of a run between two fused steps, and the parts of its loop.

    Everything that comes out of it is a function of this state, which a checkpoint holds (``run_state``).

    Args:
        config: of the run.
        model: the frozen base.
        reader: reads the jobs' data.
        say: takes messages.
    """

    def __init__(
        self, config: TrainConfig, model: LlamaForCausalLM, reader: JobReader, say: Callable[[str], None]
    ) -> None:
        self._max_batch_tokens = config.max_batch_tokens
        self._model = model
        self._reader = reader
        self._say = say
        self.queue = JobQueue(config.max_concurrent_adapters)
        self.dispatcher = Dispatcher({}, config.max_batch_tokens)
        self.halving = Halving(config.sweeps, config.adapters)
        self.listeners: list[Listener] = []
        self.fused_step = 0
        self.journal_position = 0
        self.has_ended_jobs = False  # since the last checkpoint

    def take_in(self, settings: AdapterJob, *, is_submitted: bool = False) -> Job:
        """Put a job into the queue.

        Raises:
            ValueError: when it cannot be trained here.
        """
        self.queue.check_name(settings.name)
        data = self._reader.read(settings)
        check_fit(settings.name, data, self._model.config_, settings.adapter.context_tokens)
        # Its turn may come much later: what cannot be attached then would end the whole run.
        self._model.add_adapter(settings.name, settings.adapter, tokenizer=self._reader.tokenizer)
        try:
            settings.adapter.updates(self._model, settings.name, data.plan.num_steps)
        finally:
            self._model.remove_adapter(settings.name)
        job = Job(settings, data, is_submitted)
        self.queue.add(job)
        return job

    def refuse(self, name: str, reason: str) -> None:
        """Note a submitted job that cannot be one of the run's."""
        self.queue.refusals.append(Refusal(name, reason))
        self._emit(JobMetrics(adapter=name, state="refused", reason=reason))

    def tell(self, jobs: Sequence[Job], *, reason: str | None = None) -> None:
        """A row of the state of each of these jobs."""
        for job in jobs:
            saved_to = None if job.saved_to is None else job.saved_to.as_posix()
            self._emit(
                JobMetrics(
                    adapter=job.name,
                    state=job.state,
                    step=job.record.steps_taken,
                    reason=reason or job.reason,
                    saved_to=saved_to,
                )
            )

    def begin(self, folder: RunFolder) -> None:
        """The rows of a run that has just been set up, and what comes before its first step."""
        for job in self.queue:
            self._emit(JobMetrics(adapter=job.name, state="queued"))
        self._welcome([job for job in self.queue if job.state != "queued"], folder)

    def fill_places(self, folder: RunFolder) -> None:
        """Let jobs from the queue take the free places."""
        while admitted := self.admit():
            self._welcome(admitted, folder)

    def _welcome(self, admitted: Sequence[Job], folder: RunFolder) -> None:
        self.tell(admitted)
        self.evaluate([job for job in admitted if job.run is not None and not job.record.evals])
        self.retire_ended(folder)
        for job in admitted:
            if not job.is_under_way:
                self._follow(self.halving.leave(job.name), folder)

    def admit(self) -> list[Job]:
        """Fill the free places from the queue; returns those that came in, or failed to."""
        admitted = []
        while (job := self.queue.next_in()) is not None:
            try:
                self.put_on_model(job)
            except torch.OutOfMemoryError:
                if self.queue.running:
                    self._say(f"{job.name}: out of memory, so it waits until another adapter has ended")
                    self.queue.close_free_places()
                    break
                job.end(Ending("failed", "its weights and optimizer do not fit into memory"))
                self.has_ended_jobs = True
                admitted.append(job)
                continue
            job.state = "running"
            if job.record.steps_taken:
                self.dispatcher.rejoin(job.name, job.data.plan, job.record.steps_taken)
            else:
                self.dispatcher.add(job.name, job.data.plan)
            admitted.append(job)
        return admitted

    def put_on_model(self, job: Job) -> AdapterRun:
        """Attach a job's adapter, a new one or a parked one."""
        try:
            self._model.add_adapter(
                job.name, job.settings.adapter, seed=job.data.seed, tokenizer=self._reader.tokenizer
            )
        except ValueError as error:
            raise ValueError(f"adapter {job.name!r}: {error}") from error
        if job.loss_scale is None and self._model.dtype == torch.float16:
            job.loss_scale = LossScale()
        data = job.data
        try:
            run = AdapterRun(
                job.settings, self._model, data.plan, data.train_set, data.eval_set, job.loss_scale, record=job.record
            )
            if job.parked is not None:
                restore_tensors(run, job.parked)
        except BaseException:
            self._model.remove_adapter(job.name)
            raise
        job.parked = None
        job.run = run
        return run

    def take_step(self, micro_batches: Sequence[MicroBatch]) -> list[Job]:
        """One fused forward and backward, and the optimizer step of each adapter whose last micro-batch this was.

        Returns:
            The jobs that came to the end of an optimizer step.
        """
        self.fused_step += 1
        runs = {micro_batch.adapter: self._run_of(micro_batch.adapter) for micro_batch in micro_batches}
        for run in runs.values():
            run.start_clock()
        parameters = {name: run.parameters for name, run in runs.items()}
        scales = {name: run.loss_scale.value for name, run in runs.items() if run.loss_scale is not None}
        ready = []
        for outcome in run_fused(self._model, micro_batches, parameters, self._say, scales):
            run = runs[outcome.micro_batch.adapter]
            run.take_in(outcome)
            if outcome.micro_batch.is_last:
                ready.append((run, outcome.micro_batch))
        if not ready:
            return []
        norms = torch.stack([run.gradient_norm() for run, _ in ready]).tolist()  # one transfer from a GPU
        for (run, micro_batch), norm in zip(ready, norms, strict=True):
            row = run.step(micro_batch, norm)
            self._emit(row)
            self.halving.observe(row.adapter, row.loss)
            if run.steps_taken % EXPERT_ROW_STEPS == 0:
                self._emit_expert_counts(run)
        return [self.queue.jobs[run.job.name] for run, _ in ready]

    def evaluate(self, jobs: Sequence[Job]) -> None:
        """Held-out losses of those jobs that have held-out data."""
        runs = {job.name: self._run_of(job.name) for job in jobs if job.data.eval_set is not None}
        held_out = {name: run.eval_set.samples for name, run in runs.items() if run.eval_set is not None}
        if not held_out:
            return
        self.stop_clocks()
        for name, (loss, count) in evaluate(self._model, held_out, self._max_batch_tokens).items():
            run = runs[name]
            row = EvalMetrics(adapter=name, step=run.steps_taken, eval_loss=loss, num_supervised_tokens=count)
            row = dataclasses.replace(row, fused_step=self.fused_step)
            run.take_evaluation(row)
            self._emit(row)

    def stop_clocks(self) -> None:
        """What comes until the next forward is no step's time."""
        for job in self.queue.running:
            self._run_of(job.name).stop_clock()

    def finish_step(self, stepped: Sequence[Job], folder: RunFolder) -> None:
        """What comes behind a step: evaluations that are due, the ends of adapters, the selections of sweeps."""
        at_rung = [job for job in stepped if self._is_at_rung(job)]
        self.evaluate([job for job in stepped if self._is_evaluation_due(job, job in at_rung)])
        self.retire_ended(folder)
        self._halve([job for job in at_rung if job.state == "running"], folder)

    def _is_evaluation_due(self, job: Job, is_at_rung: bool) -> bool:
        run = self._run_of(job.name)
        if run.failure is not None:
            return False
        every = job.settings.eval_steps
        is_regular = every is not None and run.steps_taken % every == 0
        is_compared = is_at_rung and self.halving.needs_eval(job.name)
        return is_regular or is_compared or run.steps_taken == run.plan.num_steps

    def _is_at_rung(self, job: Job) -> bool:
        run = self._run_of(job.name)
        return run.is_active and self.halving.is_rung(job.name, run.steps_taken)

    def _halve(self, arrived: Sequence[Job], folder: RunFolder) -> None:
        """Members of sweeps have come to a rung: they wait there off the model, unless that decides for all of them."""
        decisions: dict[str, Decision] = {}
        for job in arrived:
            evals = job.record.evals
            decisions |= self.halving.arrive(job.name, evals[-1].eval_loss if evals else None)
        for job in arrived:
            if job.name not in decisions:
                job.parked = {name: tensor.cpu() for name, tensor in tensors_of(self._run_of(job.name)).items()}
                self._take_off_model(job)
                job.state = "waiting"
                self.tell([job])
        self._follow(decisions, folder)

    def _follow(self, decisions: Mapping[str, Decision], folder: RunFolder) -> None:
        for name, decision in decisions.items():
            job = self.queue.jobs[name]
            if not decision.goes_on:
                self.retire(job, Ending("halved", decision.reason), folder)
                continue
            if job.state == "waiting":
                job.state = "queued"
            self.tell([job], reason=decision.reason)

    def retire_ended(self, folder: RunFolder) -> None:
        """Retire the running jobs that have reached their end, a good one or a bad one."""
        for job in self.queue.running:
            ending = self._run_of(job.name).ending
            if ending is not None:
                self.retire(job, ending, folder)

    def retire(self, job: Job, ending: Ending, folder: RunFolder) -> None:
        """Save a job's adapter, take it off the model and free its place; one that never began is not saved."""
        if job.run is None and job.parked is not None:
            self.put_on_model(job)
        if job.run is not None:
            run = job.run
            run.settle()
            if run.failure is not None:  # its weights may only now have shown what they are
                ending = Ending("failed", run.failure)
            self._emit_expert_counts(run)
            job.saved_to = folder.save(self._model, job.name).relative_to(folder.path)
            self._take_off_model(job)
        job.end(ending)
        self.has_ended_jobs = True
        self.tell([job])
        self._follow(self.halving.leave(job.name), folder)

    def _take_off_model(self, job: Job) -> None:
        self.dispatcher.remove(job.name)
        self._model.remove_adapter(job.name)
        job.run = None

    def _run_of(self, name: str) -> AdapterRun:
        run = self.queue.jobs[name].run
        assert run is not None, f"{name} is not on the model"
        return run

    def _emit_expert_counts(self, run: AdapterRun) -> None:
        row = run.take_expert_counts()
        if row is not None:
            self._emit(row)

    def _emit(self, row: Row) -> None:
        row = dataclasses.replace(row, fused_step=self.fused_step)
        for listener in self.listeners:
            listener.take(row)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of every job that has some, by its name."""
        named = {job.name: tensors_of(job.run) for job in self.queue if job.run is not None}
        return named | {job.name: job.parked for job in self.queue if job.parked is not None}
