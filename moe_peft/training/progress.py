"""A run's progress on the console: a live table on a terminal, plain lines anywhere else."""

import math
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from moe_peft.training.metrics import EvalMetrics, StepMetrics

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

# The ETA follows the last steps only: the pace changes whenever a neighbour joins or leaves the fused batch.
ETA_WINDOW = 20


def format_seconds(seconds: float) -> str:
    """``75`` -> ``1:15``, ``3675`` -> ``1:01:15``."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class _AdapterProgress:
    """What is known of one adapter so far."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self.last: StepMetrics | None = None
        self.evals: list[EvalMetrics] = []
        self.status: str | None = None
        self.line_time = -math.inf  # when its last plain line was printed
        self._times: deque[tuple[int, float]] = deque(maxlen=ETA_WINDOW + 1)

    @property
    def current_step(self) -> int:
        return self.last.step if self.last is not None else 0

    def record(self, metrics: StepMetrics, now: float) -> None:
        self.last = metrics
        self.num_steps = metrics.num_steps
        self._times.append((metrics.step, now))

    def eta(self) -> float | None:
        """Seconds until its last step at the pace of its latest ones; None before the first."""
        if self.last is None:
            return None
        (first_step, first_time), (last_step, last_time) = self._times[0], self._times[-1]
        if last_step == first_step:
            pace = self.last.seconds
        else:
            pace = (last_time - first_time) / (last_step - first_step)
        return pace * (self.num_steps - last_step)

    def aux_text(self) -> str:
        return f"{self.last.aux_loss:.4f}" if self.last is not None and self.last.aux_loss else "–"

    def eval_text(self) -> str:
        """The first held-out loss and, once there is another, the latest."""
        losses = [f"{metrics.eval_loss:.3f}" for metrics in self.evals]
        return " → ".join(losses[:1] + losses[1:][-1:]) or "–"


class Progress:
    """Shows per adapter: step, loss, aux loss, learning rate, supervised tokens/s, time left and held-out loss.

    On a terminal a table is redrawn in place. Elsewhere (a pipe, a log file, a dumb terminal) an adapter's first
    and last step, every evaluation, and one step at most every ``seconds_between_lines`` become a line each.

    Args:
        num_steps: optimizer steps of every adapter, in the order of display.
        console: the rich console to draw on; None for standard output.
        seconds_between_lines: the least time between two plain lines of one adapter.
        clock: monotonic seconds; another one only in tests.
    """

    def __init__(
        self,
        num_steps: dict[str, int],
        console: "Console | None" = None,
        *,
        seconds_between_lines: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        from rich.console import Console

        self._console = console if console is not None else Console()
        self._adapters = {name: _AdapterProgress(total) for name, total in num_steps.items()}
        self._seconds_between_lines = seconds_between_lines
        self._clock = clock
        self._live: Live | None = None

    def __enter__(self) -> "Progress":
        if self._console.is_interactive:
            from rich.live import Live

            self._live = Live(get_renderable=self.table, console=self._console, refresh_per_second=4)
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def step(self, metrics: StepMetrics) -> None:
        """Take in one optimizer step."""
        now = self._clock()
        adapter = self._adapters[metrics.adapter]
        is_first = adapter.last is None
        adapter.record(metrics, now)
        if self._live is not None:
            return
        is_due = now - adapter.line_time >= self._seconds_between_lines
        if is_first or is_due or metrics.step == metrics.num_steps:
            adapter.line_time = now
            self._line(self._step_text(metrics, adapter))

    def eval(self, metrics: EvalMetrics) -> None:
        """Take in one evaluation on held-out data."""
        adapter = self._adapters[metrics.adapter]
        adapter.evals.append(metrics)
        if self._live is None:
            counter = f"{metrics.step}/{adapter.num_steps}"
            self._line(f"{metrics.adapter}  step {counter}  held-out loss {metrics.eval_loss:.4f}")

    def message(self, text: str) -> None:
        """Print a line; on a terminal it stands above the table."""
        self._line(text)

    def done(self, adapter: str, status: str) -> None:
        """Close an adapter's row with its status: ``done``, or what ended it."""
        self._adapters[adapter].status = status
        # In the table a good end speaks for itself, but a reason needs room for its words.
        if self._live is None or status != "done":
            self._line(f"{adapter}  {status}")

    def table(self) -> "Table":
        """The table as it stands now."""
        from rich import box
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        is_narrow = self._console.width < 110
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 0 if is_narrow else 1), pad_edge=False)
        table.add_column("adapter", style="bold", no_wrap=True, overflow="ellipsis", max_width=14 if is_narrow else 24)
        table.add_column("")
        for title in ("step", "loss", "aux", "lr", "tok/s", "left", "held-out loss"):
            table.add_column(title, justify="right", no_wrap=True)
        for name, adapter in self._adapters.items():
            bar = ProgressBar(
                total=max(1, adapter.num_steps), completed=adapter.current_step, width=8 if is_narrow else 24
            )
            last, eta = adapter.last, adapter.eta()
            if adapter.status is not None:
                # Reasons were printed above the table; the cell only tells good from bad.
                left = Text("done", style="green") if adapter.status == "done" else Text("ended", style="red")
            else:
                left = Text("–" if eta is None else format_seconds(eta))
            table.add_row(
                Text(name),
                bar,
                f"{adapter.current_step}/{adapter.num_steps}",
                f"{last.loss:.3f}" if last is not None else "–",
                adapter.aux_text(),
                f"{last.lr:.1e}" if last is not None else "–",
                f"{last.tokens_per_second:.0f}" if last is not None else "–",
                left,
                adapter.eval_text(),
            )
        return table

    def _step_text(self, metrics: StepMetrics, adapter: _AdapterProgress) -> str:
        parts = [
            metrics.adapter,
            f"step {metrics.step}/{metrics.num_steps}",
            f"loss {metrics.loss:.4f}",
            f"aux {metrics.aux_loss:.4f}" if metrics.aux_loss else "",
            f"lr {metrics.lr:.2e}",
            f"{metrics.tokens_per_second:.0f} tok/s",
            f"{format_seconds(adapter.eta() or 0.0)} left",
        ]
        return "  ".join(part for part in parts if part)

    def _line(self, text: str) -> None:
        # As it is: a log line is neither wrapped at a width nor read as markup.
        self._console.print(text, soft_wrap=True, markup=False, highlight=False)
