"""What a run measures, one JSON object a line in ``metrics.jsonl``."""

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """One optimizer step of one adapter.

    Args:
        step: the optimizer step, from 1 to ``num_steps``.
        epoch: passes over the adapter's data made so far, with its fraction.
        loss: mean negative log-likelihood over the step's supervised tokens, in nats.
        aux_loss: the router losses, already multiplied by their coefficients; 0 where there are none.
        lr: the learning rate this step was taken with.
        grad_norm: 2-norm of the adapter's gradient before clipping; not finite where the step was skipped.
        num_supervised_tokens: tokens of the step that carry a loss.
        num_tokens: all tokens of the step, prompts included.
        seconds: wall-clock time of the step.
        tokens_per_second: supervised tokens a second.
        loss_scale: what the loss was multiplied by before the backward; None where the base needs no such factor.
        skipped_steps: steps up to this one that were skipped; None while there is neither one nor a loss scale.
        skipped: why this step was skipped (its weights stayed, its data and schedule went on); None when it was taken.
        fused_step: fused steps of the run up to this row.
    """

    adapter: str
    step: int
    num_steps: int
    epoch: float
    loss: float
    aux_loss: float
    lr: float
    grad_norm: float
    num_supervised_tokens: int
    num_tokens: int
    seconds: float
    tokens_per_second: float
    loss_scale: float | None = None
    skipped_steps: int | None = None
    skipped: str | None = None
    fused_step: int = 0


@dataclass(frozen=True, kw_only=True)
class EvalMetrics:
    """Held-out loss of one adapter after ``step`` optimizer steps; step 0 is before any training."""

    adapter: str
    step: int
    eval_loss: float
    num_supervised_tokens: int
    fused_step: int = 0


@dataclass(frozen=True, kw_only=True)
class JobMetrics:
    """A job entered a state.

    Args:
        adapter: its name.
        state: one of ``JOB_STATES``.
        step: optimizer steps taken so far.
        reason: why, in words, where the state alone does not say it.
        saved_to: the adapter's folder, relative to the run's, once it is saved.
        fused_step: fused steps of the run up to this row.
    """

    adapter: str
    state: str
    step: int = 0
    reason: str | None = None
    saved_to: str | None = None
    fused_step: int = 0


@dataclass(frozen=True, kw_only=True)
class ExpertMetrics:
    """How many tokens each expert got since the adapter's last such row.

    Args:
        step: optimizer steps taken so far.
        counts: of every routed layer, one number an expert.
    """

    adapter: str
    step: int
    counts: tuple[tuple[int, ...], ...]
    fused_step: int = 0


Row = StepMetrics | EvalMetrics | JobMetrics | ExpertMetrics
EVENTS: dict[type, str] = {StepMetrics: "step", EvalMetrics: "eval", JobMetrics: "job", ExpertMetrics: "experts"}

UNDER_WAY = ("queued", "running", "waiting")  # waiting: a member of a sweep, until its turn is decided
FINISHED = ("done", "early-stopped", "halved")
UNFINISHED = ("stopped", "failed", "refused")
JOB_STATES = UNDER_WAY + FINISHED + UNFINISHED


class Listener(Protocol):
    """Whatever wants to see the rows of a run as they come."""

    def take(self, row: Row) -> None:
        """Take in one row."""


def _cut(path: Path, offset: int | None) -> None:
    """Drop what stands behind ``offset``; of None, a last line without its newline.

    A run killed in the middle of a write must not spoil the next row.
    """
    if not path.exists():
        if offset:
            raise ValueError(f"{path} is gone, but its run's checkpoint knows of {offset:,} bytes in it")
        return
    if offset is not None and path.stat().st_size < offset:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, but its run's checkpoint knows of {offset:,}")
    with path.open("rb+") as file:
        file.truncate(file.read().rfind(b"\n") + 1 if offset is None else offset)


class MetricsWriter:
    """Appends rows to ``metrics.jsonl`` and flushes each, so the file can be followed while the run goes on.

    Args:
        path: the file; made with its folder when missing, appended to otherwise.
        offset: bytes of the file to keep, as ``sync`` gave them; None keeps every whole row.

    Raises:
        ValueError: when the file has fewer bytes than ``offset``.
    """

    def __init__(self, path: str | Path, offset: int | None = None) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _cut(self.path, offset)
        self._file = self.path.open("ab")

    def take(self, row: Row) -> None:
        """Append one row: NaN and infinities become null, which is what JSON has for them; None is left out."""
        plain: dict[str, object] = {"event": EVENTS[type(row)]}
        for key, value in dataclasses.asdict(row).items():
            if value is not None:
                plain[key] = None if isinstance(value, float) and not math.isfinite(value) else value
        self._file.write((json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n").encode())
        self._file.flush()

    def sync(self) -> int:
        """Have the rows so far on the disk, and return their bytes."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        self._file.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``, oldest first; a torn last line of a killed run is left out.

    Raises:
        ValueError: on a complete line that is not a JSON object with an ``event``, with file and line.
    """
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict) or "event" not in row:
            raise ValueError(f"{path}, line {number}: a row of metrics must be an object with an event")
        rows.append(row)
    return rows
