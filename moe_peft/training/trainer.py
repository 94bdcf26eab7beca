"""A training run from its config to the saved adapters."""

import shlex
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from moe_peft import ops
from moe_peft.config import TrainConfig
from moe_peft.data.tokenizer import Tokenizer, load_tokenizer
from moe_peft.io.base_model import load_base_model
from moe_peft.model.llama import LlamaForCausalLM
from moe_peft.training.adapter_run import AdapterRun, Ending
from moe_peft.training.answers import answer_held_out_prompts
from moe_peft.training.display.alarms import Alarms
from moe_peft.training.display.closing import TrainResult, finish, opening_line, print_sizes, results_of
from moe_peft.training.display.progress import Progress
from moe_peft.training.errors import TrainingError
from moe_peft.training.folder.inbox import Inbox, Request
from moe_peft.training.folder.journal import Journal
from moe_peft.training.folder.leaderboard import write_leaderboard
from moe_peft.training.folder.metrics import MetricsWriter, read_metrics
from moe_peft.training.folder.rows import typed_rows
from moe_peft.training.folder.run_folder import RunFolder
from moe_peft.training.fused_run import FusedRun
from moe_peft.training.interrupt import InterruptGuard
from moe_peft.training.job_queue import Job
from moe_peft.training.preparation import JobReader, check_loaded
from moe_peft.training.resume import FORMAT, find_earlier_run, machine, warn_of_another_machine
from moe_peft.training.run_state import restore, state_of

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["TrainResult", "Trainer"]

# Between two looks for a request that cannot be written down, say because the disk is full.
PAUSE = 0.2


class Trainer:
    """Trains the adapters of a config together on one frozen base.

    The constructor reads and checks everything the user gave and writes nothing.

    Args:
        config: the run. Where its folder holds a run of this config, that run goes on from its newest checkpoint.
        resume: whether it may; if not, a folder with a run in it is refused.
        console: where progress and reports go; None: standard output.
        model: the base model, loaded already; None: it is loaded here. Other adapters may be on it; what the run
            switches on it (``train()``, ``activation_checkpointing_``) stays so.
        tokenizer: of the base model; None: it is read here.

    Raises:
        ValueError: on anything wrong with the data, the base model or how they fit together, and on a folder that holds
            something else than a run of this config.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        resume: bool = True,
        console: "Console | None" = None,
        model: LlamaForCausalLM | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        from rich.console import Console

        self.console = console or Console()
        earlier = find_earlier_run(config, resume, self._warn)
        self._is_resumed = earlier is not None
        self._paths_found = earlier.paths if earlier is not None else []
        self._checkpoint = earlier.checkpoint if earlier is not None else None
        self._is_complete = earlier is not None and earlier.is_complete
        self.config = config = config if earlier is None else earlier.config
        if self._is_complete:
            return
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        if config.tensorboard:
            from moe_peft.training.display.scalars import check_tensorboard

            check_tensorboard()
        # Data before weights: a typo in a path shows in a second.
        self.tokenizer = tokenizer or load_tokenizer(config.base_model)
        reader = JobReader(self.tokenizer, config.seed)
        for job in config.adapters:
            reader.read(job)
        if model is None:
            self._say(f"Loading the base model {config.base_model}")
            model = load_base_model(config.base_model, dtype=config.dtype, device=config.device)
        check_loaded(model, config)
        self.model = model
        self.model.activation_checkpointing_ = config.activation_checkpointing
        if self.model.dtype == torch.float16 and self.model.device.type == "cpu":
            self._say("Warning: CPUs multiply float16 matrices very slowly; dtype bfloat16 or float32 is far faster")
        elif self.model.device.type == "cpu" and self.model.dtype != torch.float64:
            if ops.needs_compiling():
                self._say("Compiling the CPU's operations, once for this machine")
            if problem := ops.compiled_library().problem:
                self._say(f"Warning: {problem}, so the CPU runs plain PyTorch, which can take twice the time")
        self.fused_run = FusedRun(config, self.model, reader, self._say)
        for job in config.adapters:
            self.fused_run.take_in(job)
        if self._checkpoint is None:
            self.fused_run.admit()
        else:
            restore(self.fused_run, self._checkpoint.state, self._checkpoint.tensors)

    @property
    def jobs(self) -> dict[str, Job]:
        """The jobs by name, those that are queued or have ended too."""
        return self.fused_run.queue.jobs

    @property
    def runs(self) -> dict[str, AdapterRun]:
        """The adapters that are on the model, by name."""
        return {name: job.run for name, job in self.jobs.items() if job.run is not None}

    def train(self) -> TrainResult:
        """Run to the end, saving every adapter as it finishes.

        Returns:
            The run's folder and each adapter's result.

        Raises:
            UnfinishedError: when an adapter failed, or was stopped or refused. The others have finished and are saved;
                so is the failed one, with its last good weights.
            TrainingError: when the run could not go on.
            KeyboardInterrupt: on Ctrl-C, after the step in hand has been finished and a checkpoint written. SIGTERM
                raises SystemExit(143) likewise.
        """
        if self._is_complete:
            return self._tell_again()
        chosen = {"dtype": str(self.model.dtype).removeprefix("torch."), "device": str(self.model.device)}
        config = TrainConfig.from_dict({**self.config.to_dict(), **chosen})
        with RunFolder(config, is_resumed=self._is_resumed) as folder:
            return self._train_in(folder)

    def _tell_again(self) -> TrainResult:
        """The closing report of a run that came to its end before."""
        assert self._checkpoint is not None
        path = Path(str(self.config.output_dir)).expanduser()
        self._say(f"The run in {path} is complete: nothing is left to do")
        return finish(self.console, path, results_of(self._checkpoint.state, path, {}))

    def _train_in(self, folder: RunFolder) -> TrainResult:
        if folder.checkpoints.paths != self._paths_found:
            raise ValueError(f"another process has trained in {folder.path} meanwhile: start again to go on from there")
        folder.checkpoints.remove_after(self._checkpoint)
        self._say(opening_line(self.model, folder.path))
        print_sizes(self.console, self.model, list(self.jobs.values()), self.tokenizer)
        kept = 0
        if self._checkpoint is not None:
            kept = self._checkpoint.state["metrics_bytes"]
            warn_of_another_machine(self._checkpoint.state["machine"], self._warn)
            self._say(f"Going on from {self._checkpoint.path}, after fused step {self.fused_run.fused_step:,}")
        with InterruptGuard() as guard, MetricsWriter(folder.metrics, kept) as metrics:
            try:
                with self._listening(folder, metrics):
                    self._loop(folder, guard, metrics)
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

    @contextmanager
    def _listening(self, folder: RunFolder, metrics: MetricsWriter) -> Iterator[None]:
        """Have every row of the run seen by all who want to see it."""
        rows_before = typed_rows(read_metrics(folder.metrics))
        num_steps = {name: job.data.plan.num_steps for name, job in self.jobs.items()}
        with ExitStack() as stack:
            progress = Progress(num_steps, self.console, max_batch_tokens=self.config.max_batch_tokens)
            progress.catch_up(rows_before)
            alarms = Alarms(progress.message, self.fused_run.queue.experts_a_token)
            alarms.catch_up(rows_before)
            self.fused_run.listeners = [metrics, stack.enter_context(progress), alarms]
            stack.callback(self.fused_run.listeners.clear)
            if self.config.tensorboard:
                from moe_peft.training.display.scalars import Scalars

                scalars = Scalars(folder.tensorboard)
                stack.callback(scalars.close)
                self.fused_run.listeners.append(scalars)
            yield

    def _loop(self, folder: RunFolder, guard: InterruptGuard, metrics: MetricsWriter) -> None:
        """Fused steps until every job has ended, or until a signal comes."""
        run, config = self.fused_run, self.config
        journal, inbox = Journal(folder.journal), Inbox(folder.path)
        self.model.train()
        if self._checkpoint is None:
            run.begin(folder)
        while True:
            journal.take_in(inbox, run.fused_step)
            self._follow(journal.due(run.fused_step, run.journal_position), folder)
            run.fill_places(folder)
            if run.has_ended_jobs or guard.signal is not None:
                self._save_checkpoint(folder, metrics)
            if guard.signal is not None:
                return
            micro_batches = run.dispatcher.next_batch()
            if not micro_batches:
                # A repetition that ends sooner than the run it repeats (on another machine, say) leaves nothing out.
                if rest := journal.due(None, run.journal_position):
                    self._follow(rest, folder)
                    continue
                if inbox.close():
                    return
                time.sleep(PAUSE)
                continue
            run.finish_step(run.take_step(micro_batches), folder)
            if run.has_ended_jobs or (config.save_steps is not None and run.fused_step % config.save_steps == 0):
                self._save_checkpoint(folder, metrics)

    def _follow(self, requests: list[Request], folder: RunFolder) -> None:
        """Let requests from outside take effect."""
        run = self.fused_run
        for request in requests:
            run.journal_position += 1
            if request.job is not None:
                try:
                    run.tell([run.take_in(request.job, is_submitted=True)])
                except (ValueError, OSError) as error:
                    run.refuse(request.adapter, str(error).removeprefix(f"adapter {request.adapter!r}: "))
            elif request.action == "refuse":
                run.refuse(request.adapter, str(request.error))
            elif request.adapter in self.jobs and self.jobs[request.adapter].is_under_way:
                run.retire(self.jobs[request.adapter], Ending("stopped", "by request"), folder)

    def _save_checkpoint(self, folder: RunFolder, metrics: MetricsWriter) -> None:
        run = self.fused_run
        run.stop_clocks()
        run.has_ended_jobs = False
        try:
            state = {"format": FORMAT, **state_of(run), "metrics_bytes": metrics.sync(), "machine": machine()}
            keep = self.config.keep_checkpoints
            folder.checkpoints.write(run.fused_step, state, run.tensors(), keep=keep)
        except OSError as error:
            self._warn(
                f"no checkpoint could be written after fused step {run.fused_step:,} ({error}): training goes on, and "
                "the checkpoint before it stays"
            )

    def _keep_and_tell(self, folder: RunFolder) -> list[str]:
        """Save and draw what there is at an early end, and say where, and how to go on.

        Returns:
            What could not be saved, and why.
        """
        unsaved = self._save_rest(folder)
        self._say("Stopped early; every adapter is saved as it stands:")
        for job in self.jobs.values():
            if job.saved_to is not None:
                self._say(f"  {folder.path / job.saved_to}")
        for reason in unsaved:
            self._say(reason)
        self._draw(folder)
        self._say(f"Go on with: python -m moe_peft.train {shlex.quote(str(folder.path / 'config.yaml'))}")
        return unsaved

    def _save_rest(self, folder: RunFolder) -> list[str]:
        """Save every adapter that is on the model.

        Returns:
            What could not be saved, and why: after a failure (a full disk, say) a smaller adapter may still fit.
        """
        unsaved = []
        for name, run in self.runs.items():
            try:
                run.settle()
                self.jobs[name].saved_to = folder.save(self.model, name).relative_to(folder.path)
            except Exception as error:
                unsaved.append(f"adapter {name!r} could not be saved: {error}")
        return unsaved

    def _draw(self, folder: RunFolder) -> None:
        for run in self.runs.values():
            run.take_expert_counts()  # up to here, in the record
        records = {name: job.record.expert_counts for name, job in self.jobs.items()}
        try:
            folder.draw({name: counts for name, counts in records.items() if counts is not None})
        except Exception as error:  # pictures are worth no run
            self._say(f"the pictures could not be drawn: {error}")

    def _close(self, folder: RunFolder) -> TrainResult:
        self._draw(folder)
        write_leaderboard(folder.path)
        examples = {}
        try:
            examples = answer_held_out_prompts(
                self.model, self.tokenizer, list(self.jobs.values()), folder.path, self.config.answer_examples
            )
        except (ValueError, RuntimeError, OSError) as error:  # out of memory, say: the report below is worth more
            self._say(f"no prompts were answered: {error}")
        return finish(self.console, folder.path, results_of(state_of(self.fused_run), folder.path, examples))

    def _say(self, text: str) -> None:
        # As it is: a path may hold what rich would read as markup.
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _warn(self, text: str) -> None:
        self._say(f"Warning: {text}")
