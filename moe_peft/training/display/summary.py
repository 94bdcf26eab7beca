"""What a run tells before and after training: sizes first, then losses and answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moe_peft.training.display.progress_table import format_seconds
from moe_peft.training.folder.metrics import FINISHED

if TYPE_CHECKING:
    from rich.console import Console, Group, RenderableType
    from rich.table import Table

# Width of a report that is not for a terminal, where no window tells one.
PLAIN_WIDTH = 110


@dataclass(frozen=True, kw_only=True)
class AdapterSummary:
    """An adapter before training.

    Args:
        num_trainable: its parameters.
        num_base: the base model's parameters, all frozen.
        num_samples: training samples after tokenizing.
        num_truncated: samples whose prompt was cut to ``cutoff_len``.
        num_skipped: samples left out because their answer alone was longer than ``cutoff_len``.
    """

    name: str
    method: str
    num_trainable: int
    num_base: int
    num_samples: int
    num_steps: int
    num_truncated: int = 0
    num_skipped: int = 0


@dataclass(frozen=True, kw_only=True)
class AnswerExample:
    """A held-out prompt with the answer it should get and the two it got."""

    prompt: str
    expected: str
    base_answer: str
    adapter_answer: str


@dataclass(frozen=True, kw_only=True)
class AdapterResult:
    """An adapter after training.

    Args:
        state: how it ended: one of ``metrics.JOB_STATES``.
        num_steps: optimizer steps taken.
        reason: why it ended so, where the state alone does not say it.
        skipped_steps: those of them that were skipped, as their loss or gradient was not finite or overflowed float16.
        seconds: wall-clock time from its first step to its last.
        eval_loss_before: held-out loss before the first step; None without held-out data.
        eval_loss_after: held-out loss of the saved weights; None without held-out data.
        saved_to: its folder; None when it was not saved.
    """

    name: str
    state: str
    num_steps: int
    seconds: float
    reason: str | None = None
    eval_loss_before: float | None = None
    eval_loss_after: float | None = None
    saved_to: Path | None = None
    skipped_steps: int = 0
    examples: tuple[AnswerExample, ...] = ()

    @property
    def status(self) -> str:
        """State and reason, for a person."""
        return self.state if self.reason is None else f"{self.state}: {self.reason}"

    @property
    def is_finished(self) -> bool:
        """Whether it came to a good end."""
        return self.state in FINISHED


def format_share(num_trainable: int, num_base: int) -> str:
    """Trainable parameters as percent of the base, with three significant digits: ``1.81%``."""
    return f"{100 * num_trainable / num_base:.3g}%"


def format_reduction(num_trainable: int, num_base: int) -> str:
    """How many times fewer parameters are trained than the base has: ``55.1×``; a dash when none are."""
    return f"{num_base / num_trainable:,.1f}×" if num_trainable else "–"


def format_change(before: float | None, after: float | None) -> str:
    """The change of a loss in percent, with its sign: ``-63.2%``; a dash where one is missing or before is 0."""
    return f"{100 * (after - before) / before:+.1f}%" if before and after is not None else "–"


def parameters_table(summaries: Sequence[AdapterSummary]) -> "Table":
    """The table printed before training: what every adapter trains, and on how much.

    Args:
        summaries: one for every adapter, in the order of display.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    has_skipped = any(summary.num_skipped for summary in summaries)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("adapter", style="bold", overflow="fold")
    table.add_column("method")
    for title in ("trainable", "of base", "reduction", "samples", "truncated", *["skipped"] * has_skipped, "steps"):
        table.add_column(title, justify="right", no_wrap=True)
    for summary in summaries:
        table.add_row(
            Text(summary.name),
            summary.method,
            f"{summary.num_trainable:,}",
            format_share(summary.num_trainable, summary.num_base),
            format_reduction(summary.num_trainable, summary.num_base),
            f"{summary.num_samples:,}",
            f"{summary.num_truncated:,}",
            *[f"{summary.num_skipped:,}"] * has_skipped,
            f"{summary.num_steps:,}",
        )
    return table


def _losses_table(results: Sequence[AdapterResult]) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    has_skipped = any(result.skipped_steps for result in results)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="Held-out loss", title_justify="left")
    table.add_column("adapter", style="bold", overflow="fold")
    for heading in ("before", "after", "change", "steps", *["skipped"] * has_skipped, "time"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("status", overflow="fold")
    for result in results:
        before, after = result.eval_loss_before, result.eval_loss_after
        is_better = before is not None and after is not None and after < before
        table.add_row(
            Text(result.name),
            "–" if before is None else f"{before:.3f}",
            "–" if after is None else f"{after:.3f}",
            Text(format_change(before, after), style="green" if is_better else ""),
            f"{result.num_steps:,}",
            *[f"{result.skipped_steps:,}"] * has_skipped,
            format_seconds(result.seconds),
            Text(result.status, style="green" if result.is_finished else "red"),
        )
    return table


def _examples_table(result: AdapterResult) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=None, show_header=False, pad_edge=False, padding=(0, 1), title=f"Held-out answers of {result.name}"
    )
    table.title_justify = "left"
    table.add_column(style="dim", justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for i, example in enumerate(result.examples):
        if i:
            table.add_row("", "")
        is_right = example.adapter_answer.strip() == example.expected.strip()
        table.add_row("prompt", Text(example.prompt.strip()))
        table.add_row("expected", Text(example.expected.strip()))
        table.add_row("base", Text(example.base_answer.strip() or "(nothing)"))
        # Text, and no markup anywhere: a model's answer may well hold square brackets.
        table.add_row(
            "adapter", Text(example.adapter_answer.strip() or "(nothing)", style="bold green" if is_right else "bold")
        )
    return table


def closing_report(results: Sequence[AdapterResult]) -> "Group":
    """The report printed at the end: losses, answers, and where everything was saved.

    Args:
        results: one for every adapter, in the order of display.
    """
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [_losses_table(results)]
    for result in results:
        if result.examples:
            parts += [_examples_table(result), ""]
    for result in results:
        where = "not saved" if result.saved_to is None else f"saved to {result.saved_to}"
        parts.append(Text(f"{result.name}: {where}", no_wrap=True, overflow="ignore"))
    return Group(*parts)


def print_report(console: "Console", report: "RenderableType") -> None:
    """Print one of the two reports: as wide as the terminal, or as a log file reads well.

    Args:
        console: where to print.
        report: what ``parameters_table`` or ``closing_report`` returned.
    """
    from rich.console import Console

    target = console if console.is_terminal else Console(file=console.file, width=PLAIN_WIDTH, force_terminal=False)
    # Nothing is cropped: a saved path longer than the window must stay whole, to be copied.
    target.print(report, crop=False)
