"""The proof that fusing changes nothing: every adapter of a config in the fused batch, and alone with the same weights.

docs/proof.md says what is compared with what, and why.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from moe_peft import ops
from moe_peft.config import TrainConfig
from moe_peft.data.tokenizer import load_tokenizer
from moe_peft.io.base_model import load_base_model
from moe_peft.model.llama import LlamaForCausalLM
from moe_peft.training.adapter_run import AdapterRun, Ending
from moe_peft.training.display.summary import print_report
from moe_peft.training.fused_run import FusedRun
from moe_peft.training.fused_step import Outcome, run_fused
from moe_peft.training.job_queue import Job
from moe_peft.training.preparation import JobReader
from moe_peft.training.proof.check import Check, Examination
from moe_peft.training.proof.table import proof_report

if TYPE_CHECKING:
    from rich.console import Console


def verify(config: TrainConfig, num_steps: int = 3, console: "Console | None" = None) -> bool:
    """Train the first steps of a config, and compare every adapter in the fused batch with itself alone.

    Nothing is written.

    Args:
        config: the run.
        num_steps: optimizer steps of every adapter that are compared.
        console: where the table goes; None: standard output.

    Returns:
        Whether nothing but rounding differs.

    Raises:
        ValueError: when there is nothing to compare, or on anything wrong with the config.
    """
    from rich.console import Console

    if num_steps < 1:
        raise ValueError(f"verify={num_steps} must be at least 1 step")
    console = console or Console()
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    reader = JobReader(load_tokenizer(config.base_model), config.seed)
    for job in config.adapters:
        reader.read(job)  # data before weights: a typo in a path shows in a second
    say(f"Loading the base model {config.base_model}")
    model = load_base_model(config.base_model, dtype=config.dtype, device=config.device)
    model.activation_checkpointing_ = config.activation_checkpointing
    run = FusedRun(config, model, reader, say)
    for job in config.adapters:
        run.take_in(job)
    checks = list(_watched(Proof(model, run, num_steps, say), console))
    missing = {job.name for job in config.adapters} - {check.adapter for check in checks}
    print_report(console, proof_report(checks, sorted(missing)))
    return not missing and all(check.is_good for check in checks)


class Proof:
    """Trains the jobs of a run for a few steps each, and compares on the way.

    The first micro-batch of every optimizer step is compared, the others only train.

    Args:
        model: the frozen base.
        run: with the jobs in its queue.
        num_steps: optimizer steps of every adapter that are compared.
        say: takes messages.
    """

    def __init__(self, model: LlamaForCausalLM, run: FusedRun, num_steps: int, say: Callable[[str], None]) -> None:
        self._model = model
        self._run = run
        self._say = say
        self._due = {job.name: min(num_steps, job.data.plan.num_steps) for job in run.queue}

    @property
    def num_checks(self) -> int:
        """How many comparisons are still to come."""
        return sum(self._due.values())

    def checks(self) -> Iterator[Check]:
        """One of every adapter and step, as they come."""
        self._model.train()
        while any(self._due.values()):
            self._run.admit()
            micro_batches = self._run.dispatcher.next_batch()
            if not micro_batches:
                return
            runs = {micro_batch.adapter: self._run_of(micro_batch.adapter) for micro_batch in micro_batches}
            parameters = {name: run.parameters for name, run in runs.items()}
            scales = {name: run.loss_scale.value for name, run in runs.items() if run.loss_scale is not None}
            with ops.batch_invariant():
                outcomes = run_fused(self._model, micro_batches, parameters, self._say, scales)
            num_tokens = sum(micro_batch.num_tokens for micro_batch in micro_batches)
            # All of them before the first optimizer step: the weights must be those of the fused batch.
            for micro_batch in micro_batches:
                name = micro_batch.adapter
                fused = next(outcome for outcome in outcomes if outcome.micro_batch.adapter == name)
                if self._due[name] and micro_batch.index == 0 and not self._overflowed(runs[name], fused):
                    share = micro_batch.num_tokens / num_tokens
                    yield Examination(self._model, runs[name], fused, share).check()
                    self._due[name] -= 1
            _take_in(outcomes, runs)
            del outcomes  # their gradients would stay beside the next batch's
            self._make_room(set(runs))

    def _overflowed(self, run: AdapterRun, fused: Outcome) -> bool:
        """Whether a loss scale was too large, which its adapter finds out by trying."""
        found = [gradient for gradient in fused.gradients if gradient is not None]
        if run.loss_scale is None or not found or bool(torch.nn.utils.get_total_norm(found).isfinite()):
            return False
        self._say(
            f"{run.job.name}: the gradient overflows at loss_scale={run.loss_scale.value:g}; its next step counts"
        )
        return True

    def _make_room(self, present: set[str]) -> None:
        """Take off the model those that have ended; where others wait for their room, those that are through, too."""
        for job in self._run.queue.running:
            if self._run_of(job.name).ending is not None:
                self._due[job.name] = 0
                self._take_off(job)
        running = self._run.queue.running
        is_crowded = any(job.state == "queued" for job in self._run.queue) or any(
            self._due[job.name] and job.name not in present for job in running
        )
        for job in running:
            if is_crowded and not self._due[job.name]:
                self._take_off(job)

    def _take_off(self, job: Job) -> None:
        self._run.dispatcher.remove(job.name)
        self._model.remove_adapter(job.name)
        job.end(Ending("done"))

    def _run_of(self, name: str) -> AdapterRun:
        run = self._run.queue.jobs[name].run
        assert run is not None
        return run


def _take_in(outcomes: Sequence[Outcome], runs: dict[str, AdapterRun]) -> None:
    """The optimizer steps, as in training."""
    for outcome in outcomes:
        run = runs[outcome.micro_batch.adapter]
        run.take_in(outcome)
        if outcome.micro_batch.is_last:
            run.step(outcome.micro_batch)


def _watched(proof: Proof, console: "Console") -> Iterator[Check]:
    """The checks, with a bar on a terminal and a line each elsewhere."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    if not console.is_interactive:
        for check in proof.checks():
            text = f"{check.adapter}, step {check.step}: {'same' if check.is_good else 'DIFFERS'}"
            console.print(text, markup=False, highlight=False, soft_wrap=True)
            yield check
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("comparing", total=proof.num_checks)
        for check in proof.checks():
            bar.advance(task)
            yield check
