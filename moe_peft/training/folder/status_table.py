"""The jobs of a run as a table for people, and as plain data for programs."""

import shlex
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_peft.training.folder.metrics import FINISHED, JOB_STATES
from moe_peft.training.folder.run_folder import CONFIG_FILE
from moe_peft.training.folder.run_status import JobStatus, RunStatus

if TYPE_CHECKING:
    from rich.console import Group

STYLES = {"running": "cyan", **dict.fromkeys(FINISHED, "green"), "failed": "red", "refused": "red", "stopped": "yellow"}
ASKED = {"submit": "waits to be taken in", "stop": "is asked to stop"}


def status_report(run: RunStatus) -> "Group":
    """What ``status`` prints: a line on the run, and a row for every job."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("adapter", style="bold", overflow="fold")
    table.add_column("method")
    table.add_column("state")
    has_evals = any(job.evals for job in run.jobs)
    has_skipped = any(job.skipped_steps for job in run.jobs)
    for heading in ("step", "loss", *["held-out loss"] * has_evals, *["skipped"] * has_skipped, "tokens/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for job in run.jobs:
        # Text, and no markup anywhere: a refused request may hold any name, and a reason square brackets.
        table.add_row(
            Text(job.name),
            job.job.method if job.job is not None else "–",
            Text(job.state, style=STYLES.get(job.state, "")),
            f"{job.step:,}/{job.num_steps:,}" if job.num_steps is not None else f"{job.step:,}",
            _loss(job.loss),
            *[_loss(job.eval_loss)] * has_evals,
            *[f"{job.skipped_steps:,}"] * has_skipped,
            # The pace of a job that is not on its way says nothing of the machine now.
            f"{job.tokens_per_second:,.0f}" if job.tokens_per_second is not None and job.is_under_way else "–",
            Text(_remark(job, run.folder)),
        )
    return Group(Text(headline(run), no_wrap=True, overflow="ignore"), table)


def headline(run: RunStatus) -> str:
    """Who trains the run, and how many of its jobs are in which state."""
    counts = Counter(job.state for job in run.jobs)
    states = ", ".join(f"{counts[state]} {state}" for state in JOB_STATES if counts[state])
    if run.trained_by is not None:
        who = f"trained by {run.trained_by}"
    elif run.is_complete:
        who = "complete"
    else:
        config = shlex.quote(str(run.folder / CONFIG_FILE))
        who = f"no process trains it; to resume: python -m moe_peft.train {config}"
    return f"{run.folder}: {states}; {who}"


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _remark(job: JobStatus, folder: Path) -> str:
    parts = [job.reason] if job.reason else []
    if job.asked is not None:
        parts.append(ASKED[job.asked])
    if job.saved_to is not None:
        parts.append(f"saved to {job.saved_to.relative_to(folder)}")
    return "; ".join(parts)


def status_dict(run: RunStatus) -> dict[str, Any]:
    """What ``status --json`` prints."""
    return {
        "folder": str(run.folder),
        "trained_by": run.trained_by,
        "is_complete": run.is_complete,
        "jobs": [
            {
                "name": job.name,
                "method": job.job.method if job.job is not None else None,
                "state": job.state,
                "step": job.step,
                "num_steps": job.num_steps,
                "loss": job.loss,
                "eval_loss": job.eval_loss,
                "best_eval_loss": job.best_eval_loss,
                "tokens_per_second": job.tokens_per_second,
                "skipped_steps": job.skipped_steps,
                "reason": job.reason,
                "saved_to": str(job.saved_to) if job.saved_to is not None else None,
                "asked": job.asked,
            }
            for job in run.jobs
        ],
    }
