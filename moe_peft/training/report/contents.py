"""What a report shows, read from the files of a run's folder."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from moe_peft.config import TrainConfig
from moe_peft.strict import show
from moe_peft.training.display.alarms import Alarms
from moe_peft.training.display.expert_load import total_counts
from moe_peft.training.folder.journal import FILE as JOURNAL_FILE
from moe_peft.training.folder.journal import Entry, read_journal
from moe_peft.training.folder.metrics import EvalMetrics, ExpertMetrics, JobMetrics, Row, StepMetrics, read_metrics
from moe_peft.training.folder.rows import typed_rows
from moe_peft.training.folder.run_status import METRICS_FILE, JobStatus, read_run
from moe_peft.training.report.series import Series, series_of

R = TypeVar("R", StepMetrics, EvalMetrics, ExpertMetrics)

LEADERBOARD_FILE = "leaderboard.json"
# The share of an adapter's steps that its map of the latest load is made of.
LATEST_SHARE = 0.1


@dataclass(frozen=True)
class AdapterRows:
    """One adapter's rows, by event.

    Args:
        place: of the adapter in the run, for its colour.
    """

    name: str
    place: int
    steps: tuple[StepMetrics, ...]
    evals: tuple[EvalMetrics, ...]
    experts: tuple[ExpertMetrics, ...]

    def line(self, value: Callable[[StepMetrics], float]) -> Series:
        """A number of every optimizer step; gaps where the step had none."""
        return series_of(self.steps, self.name, self.place, value)

    @property
    def loss(self) -> Series:
        """The training loss of every step."""
        return self.line(lambda row: row.loss)

    @property
    def eval_loss(self) -> Series:
        """The held-out losses."""
        return series_of(self.evals, self.name, self.place, lambda row: row.eval_loss)

    @property
    def skipped(self) -> list[StepMetrics]:
        """The steps that were skipped."""
        return [row for row in self.steps if row.skipped is not None]

    @property
    def counts(self) -> np.ndarray | None:
        """``[L, E]`` tokens of every expert over all of its training; None without a router."""
        return total_counts(self.experts).get(self.name)

    @property
    def latest_counts(self) -> np.ndarray | None:
        """The same over its last steps."""
        if not self.experts:
            return None
        start = self.experts[-1].step * (1 - LATEST_SHARE)
        latest = [row for row in self.experts if row.step > start]
        return total_counts(latest).get(self.name)


@dataclass(frozen=True)
class Contents:
    """All that a report shows.

    Args:
        title: what the run is called: its folder.
        config: what it was started with.
        is_under_way: some job may still take a step.
        trained_by: that process, in words.
        jobs: as ``status`` shows them.
        adapters: of every job that has rows, in the same order.
        alarms: of its routers.
        journal: what was asked of the run from outside.
        leaderboard: what its file holds; None without one.
        num_fused_steps: passes of the trainer's loop so far.
    """

    title: str
    config: TrainConfig
    is_under_way: bool
    trained_by: str | None
    jobs: tuple[JobStatus, ...]
    adapters: tuple[AdapterRows, ...]
    alarms: tuple[str, ...]
    journal: tuple[Entry, ...]
    leaderboard: Any
    num_fused_steps: int


def read_contents(folder: str | Path) -> Contents:
    """Reads a run's folder.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is not the folder of a run, or a file in it is damaged.
    """
    status = read_run(folder)
    path = status.folder
    metrics = path / METRICS_FILE
    rows = typed_rows(read_metrics(metrics)) if metrics.exists() else []
    return Contents(
        title=path.resolve().name or str(path),
        config=status.config,
        is_under_way=any(job.is_under_way for job in status.jobs),
        trained_by=status.trained_by,
        jobs=status.jobs,
        adapters=_adapters(status.jobs, rows),
        alarms=_alarms(status.jobs, rows),
        journal=tuple(read_journal(path / JOURNAL_FILE)),
        leaderboard=_leaderboard(path / LEADERBOARD_FILE),
        num_fused_steps=max((row.fused_step for row in rows), default=0),
    )


def _adapters(jobs: Sequence[JobStatus], rows: Sequence[Row]) -> tuple[AdapterRows, ...]:
    names = list(dict.fromkeys([*(job.name for job in jobs), *(row.adapter for row in rows)]))
    events: dict[str, dict[type, list[Any]]] = {name: {} for name in names}
    for row in rows:
        events[row.adapter].setdefault(type(row), []).append(row)
    return tuple(
        AdapterRows(
            name,
            place,
            tuple(own.get(StepMetrics, ())),
            tuple(own.get(EvalMetrics, ())),
            tuple(own.get(ExpertMetrics, ())),
        )
        for place, (name, own) in enumerate(events.items())
        if set(own) - {JobMetrics}
    )


def _alarms(jobs: Sequence[JobStatus], rows: Sequence[Row]) -> tuple[str, ...]:
    top_k = {job.name: getattr(job.job.adapter, "top_k", 1) for job in jobs if job.job is not None}
    said: list[str] = []
    alarms = Alarms(said.append, top_k)
    for row in rows:
        alarms.take(row)
    return tuple(text.removeprefix("Warning: ") for text in said)


def _leaderboard(path: Path) -> Any:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{show(str(path))} is not JSON: {error}") from None
