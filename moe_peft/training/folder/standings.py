"""What every adapter of a run came to, from the files in the run's folder."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_peft.config import AdapterJob
from moe_peft.training.folder.metrics import read_metrics
from moe_peft.training.folder.run_status import METRICS_FILE, JobStatus, RunStatus

# One step's training loss is mostly that of its few samples.
LAST_STEPS = 10


@dataclass(frozen=True, kw_only=True)
class Standing:
    """One adapter and what it came to.

    Args:
        settings: its job as plain data.
        state: one of ``moe_peft.training.folder.metrics.JOB_STATES``.
        reason: why, where the run says so.
        step: optimizer steps taken.
        eval_loss: of the weights that are saved; None where no evaluation has seen them.
        train_loss: the mean of its last ``LAST_STEPS`` steps.
        num_trainable: its parameters; None while it is not saved.
        num_tokens: all that it has read, prompts included.
        num_supervised_tokens: those of them that carry a loss.
        seconds: wall-clock time of its steps, in which others may have stepped too.
        saved_to: its folder, relative to the run's.
    """

    name: str
    sweep: str | None
    settings: Mapping[str, Any]
    state: str
    reason: str | None
    step: int
    eval_loss: float | None
    train_loss: float | None
    num_trainable: int | None
    num_tokens: int
    num_supervised_tokens: int
    seconds: float
    saved_to: str | None


def read_standings(run: RunStatus) -> list[Standing]:
    """Every adapter of a run, submitted ones included and refused ones left out, in the order of the run's jobs.

    Args:
        run: as ``read_run`` gives it.

    Raises:
        ValueError: when the run's metrics are damaged.
    """
    losses = _last_losses(run.folder / METRICS_FILE)
    return [
        _standing(job, job.job, losses.get(job.name, []), run.folder)
        for job in run.jobs
        if job.job is not None and job.state != "refused"
    ]


def _last_losses(metrics: Path) -> dict[str, list[float]]:
    """The training losses of each adapter's last steps; a skipped step has none."""
    losses: dict[str, list[float]] = {}
    for row in read_metrics(metrics) if metrics.exists() else []:
        if row["event"] == "step" and row["loss"] is not None:
            losses[row["adapter"]] = [*losses.get(row["adapter"], []), row["loss"]][-LAST_STEPS:]
    return losses


def _standing(status: JobStatus, job: AdapterJob, losses: Sequence[float], folder: Path) -> Standing:
    return Standing(
        name=status.name,
        sweep=job.sweep,
        settings=job.to_dict(),
        state=status.state,
        reason=status.reason,
        step=status.step,
        eval_loss=_saved_eval_loss(status, job),
        train_loss=statistics.fmean(losses) if losses else None,
        num_trainable=None if status.saved_to is None else _num_saved(status.saved_to / "adapter_model.safetensors"),
        num_tokens=status.num_tokens,
        num_supervised_tokens=status.num_supervised_tokens,
        seconds=status.seconds,
        saved_to=None if status.saved_to is None else status.saved_to.relative_to(folder).as_posix(),
    )


def _saved_eval_loss(status: JobStatus, job: AdapterJob) -> float | None:
    """The best evaluation where the best weights are kept, the last one otherwise."""
    if status.state == "failed":  # the weights have gone back to a step that was not evaluated
        return None
    if job.patience is not None:
        return status.best_eval_loss
    # One from before the first step says nothing of weights that have been trained since.
    return status.eval_loss if status.evals and (status.evals[-1][0] > 0 or status.step == 0) else None


def _num_saved(path: Path) -> int | None:
    """The number of values in a saved adapter, which holds all that was trained; None when it has been moved away."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:  # reads the header only
            names = file.keys()
            return sum(math.prod(file.get_slice(name).get_shape()) for name in names)
    except (OSError, SafetensorError):
        return None
