"""A run's progress on the console: a live picture on a terminal, plain lines anywhere else."""

import time
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING

from moe_peft.training.display.adapter_progress import AdapterProgress
from moe_peft.training.display.progress_table import format_seconds, listed, picture
from moe_peft.training.folder.metrics import FINISHED, EvalMetrics, ExpertMetrics, JobMetrics, Row, StepMetrics

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.live import Live

# Names of the queue in one plain line.
QUEUE_WIDTH = 60
# With more adapters than this at once, each has its plain line less often, so that a log grows no faster.
LINES_AT_FULL_PACE = 5


class Progress:
    """Shows the queue and, per running adapter: step, loss and its course, held-out loss, speed, time left, faults.

    On a terminal a picture is redrawn in place. Elsewhere (a pipe, a log file, a dumb terminal) an adapter's first
    and last step, every evaluation, every change of state, and one step at most every ``seconds_between_lines``
    become a line each. It is a listener to the run's rows; an adapter that it has not heard of joins with its first.

    Args:
        num_steps: optimizer steps of the adapters known at the start, in the order of display.
        console: the rich console to draw on; None for standard output.
        max_batch_tokens: the run's token budget, to tell each adapter's share of it.
        seconds_between_lines: the least time between two plain lines of one adapter, of up to five.
        clock: monotonic seconds; another one only in tests.
    """

    def __init__(
        self,
        num_steps: Mapping[str, int],
        console: "Console | None" = None,
        *,
        max_batch_tokens: int | None = None,
        seconds_between_lines: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        from rich.console import Console

        self._console = console if console is not None else Console()
        self._adapters = {name: AdapterProgress(total) for name, total in num_steps.items()}
        self._max_batch_tokens = max_batch_tokens
        self._seconds_between_lines = seconds_between_lines
        self._clock = clock
        self._start = clock()
        self._is_queue_told = True
        self._live: Live | None = None

    def __enter__(self) -> "Progress":
        self._start = self._clock()
        if self._console.is_interactive:
            from rich.live import Live

            self._live = Live(get_renderable=self.table, console=self._console, refresh_per_second=2)
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def catch_up(self, rows: Iterable[Row]) -> None:
        """Take in the rows of a run that is resumed, without a line."""
        for row in rows:
            if isinstance(row, StepMetrics):
                self._adapter(row.adapter).take_step(row, None)
            elif isinstance(row, EvalMetrics):
                self._adapter(row.adapter).evals.append(row)
            elif isinstance(row, JobMetrics):
                self._take_state(row)
            else:
                self._adapter(row.adapter).take_experts(row)

    def take(self, row: Row) -> None:
        """Take in one row."""
        if isinstance(row, StepMetrics):
            self.step(row)
        elif isinstance(row, EvalMetrics):
            self.eval(row)
        elif isinstance(row, JobMetrics):
            self._job(row)
        elif isinstance(row, ExpertMetrics):
            self._adapter(row.adapter).take_experts(row)

    def step(self, metrics: StepMetrics) -> None:
        """Take in one optimizer step."""
        now = self._clock()
        adapter = self._adapter(metrics.adapter)
        is_first = adapter.last is None
        adapter.take_step(metrics, now)
        if metrics.skipped is not None:
            self.message(f"Warning: {metrics.adapter}, step {metrics.step} was skipped: {metrics.skipped}")
        if self._live is not None:
            return
        if not self._is_queue_told:
            self._is_queue_told = True
            self._tell_queue()
        num_running = sum(other.state == "running" for other in self._adapters.values())
        pause = self._seconds_between_lines * max(1.0, num_running / LINES_AT_FULL_PACE)
        if is_first or now - adapter.line_time >= pause or metrics.step == metrics.num_steps:
            adapter.line_time = now
            self.message(self._step_text(metrics, adapter))

    def eval(self, metrics: EvalMetrics) -> None:
        """Take in one evaluation on held-out data."""
        adapter = self._adapter(metrics.adapter)
        adapter.evals.append(metrics)
        if self._live is None:
            counter = f"{metrics.step}/{adapter.num_steps}" if adapter.num_steps else f"{metrics.step}"
            self.message(f"{metrics.adapter}  step {counter}  held-out loss {metrics.eval_loss:.4f}")

    def _job(self, row: JobMetrics) -> None:
        self._take_state(row)
        if row.state == "queued" and row.fused_step == 0:
            self._is_queue_told = False
        reason = f": {row.reason}" if row.reason is not None else ""
        # In the picture a state speaks for itself, but a reason needs room for its words; and at the start the whole
        # queue stands in one line, printed with the first step.
        is_news = row.state in (*FINISHED, "waiting") or row.fused_step > 0
        if reason or (self._live is None and is_news):
            self.message(f"{row.adapter}  {row.state}{reason}")
            if self._live is None and row.state == "running":
                self._tell_queue()

    def message(self, text: str) -> None:
        """Print a line; on a terminal it stands above the picture."""
        # As it is: a log line is neither wrapped at a width nor read as markup.
        self._console.print(text, soft_wrap=True, markup=False, highlight=False)

    def done(self, adapter: str, status: str) -> None:
        """Close an adapter with its status: ``done``, or what ended it, a reason behind a colon."""
        state, _, reason = status.partition(": ")
        self._job(JobMetrics(adapter=adapter, state=state, reason=reason or None))

    def table(self) -> "Group":
        """The picture as it stands now."""
        return picture(
            dict(self._adapters),  # a copy: the console's thread draws while a submitted job joins
            width=self._console.width,
            height=self._console.height,
            max_batch_tokens=self._max_batch_tokens,
            seconds=self._clock() - self._start,
        )

    def _take_state(self, row: JobMetrics) -> None:
        # A refused job never joined, and its name may be that of an adapter that did.
        if row.state != "refused":
            self._adapter(row.adapter).take_job(row)

    def _adapter(self, name: str) -> AdapterProgress:
        return self._adapters.setdefault(name, AdapterProgress())

    def _tell_queue(self) -> None:
        queued = [name for name, adapter in self._adapters.items() if adapter.state == "queued"]
        if queued:
            self.message(f"{len(queued)} queued: {listed(queued, QUEUE_WIDTH)}")

    def _step_text(self, metrics: StepMetrics, adapter: AdapterProgress) -> str:
        share = adapter.budget_share(self._max_batch_tokens) if self._max_batch_tokens is not None else None
        experts = adapter.experts_text()
        parts = [
            metrics.adapter,
            f"step {metrics.step}/{metrics.num_steps}",
            f"loss {metrics.loss:.4f}",
            f"aux {metrics.aux_loss:.4f}" if metrics.aux_loss else "",
            f"lr {metrics.lr:.2e}",
            f"{metrics.tokens_per_second:.0f} tok/s",
            f"{share:.0%} of the budget" if share is not None else "",
            f"experts {experts}" if experts else "",
            f"{adapter.num_skipped} skipped" if adapter.num_skipped else "",
            f"{format_seconds(adapter.eta() or 0.0)} left",
        ]
        return "  ".join(part for part in parts if part)
