"""What a run measures, one JSON object a line in ``metrics.jsonl``."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any


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
        loss_scale: what the loss was multiplied by before the backward; None where the base needs no such factor.
        skipped_steps: steps up to this one that were skipped because their gradient overflowed; None likewise.
        num_supervised_tokens: tokens of the step that carry a loss.
        num_tokens: all tokens of the step, prompts included.
        seconds: wall-clock time of the step.
        tokens_per_second: supervised tokens a second.
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


@dataclass(frozen=True, kw_only=True)
class EvalMetrics:
    """Held-out loss of one adapter after ``step`` optimizer steps; step 0 is before any training."""

    adapter: str
    step: int
    eval_loss: float
    num_supervised_tokens: int


EVENTS: dict[type, str] = {StepMetrics: "step", EvalMetrics: "eval"}


def _cut_torn_line(path: Path) -> None:
    """Drop a last line without its newline: a run killed in the middle of a write must not spoil the next row."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        complete = file.read().rfind(b"\n") + 1
        file.truncate(complete)


class MetricsWriter:
    """Appends rows to ``metrics.jsonl`` and flushes each, so the file can be followed while the run goes on.

    Args:
        path: the file; made with its folder when missing, appended to otherwise.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _cut_torn_line(self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, metrics: StepMetrics | EvalMetrics) -> None:
        """Append one row: NaN and infinities become null, which is what JSON has for them; None is left out."""
        row: dict[str, object] = {"event": EVENTS[type(metrics)]}
        for key, value in dataclasses.asdict(metrics).items():
            if value is not None:
                row[key] = None if isinstance(value, float) and not math.isfinite(value) else value
        self._file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

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
