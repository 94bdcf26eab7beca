"""The state of a run between two fused steps as plain data, for a checkpoint; and a run put back into it."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from moe_peft.config import AdapterJob
from moe_peft.data.dispatcher import Cursor
from moe_peft.training.fused_run import FusedRun
from moe_peft.training.job_queue import Job, Refusal
from moe_peft.training.loss_scale import LossScale
from moe_peft.training.record import TrainingRecord


def state_of(run: FusedRun) -> dict[str, Any]:
    """All but the tensors."""
    return {
        "fused_step": run.fused_step,
        "journal_position": run.journal_position,
        "is_complete": not any(job.is_under_way for job in run.queue),
        "running": run.dispatcher.adapters,
        "jobs": [_state_of_job(run, job) for job in run.queue],
        "refusals": [dataclasses.asdict(refusal) for refusal in run.queue.refusals],
        "halving": run.halving.state(),
    }


def _state_of_job(run: FusedRun, job: Job) -> dict[str, Any]:
    return {
        "name": job.name,
        "submitted": job.settings.to_dict() if job.is_submitted else None,
        "data": job.data.fingerprint,
        "state": job.state,
        "reason": job.reason,
        "saved_to": None if job.saved_to is None else job.saved_to.as_posix(),
        "record": job.record.to_dict(),
        "loss_scale": None if job.loss_scale is None else dataclasses.asdict(job.loss_scale),
        "cursor": None if job.run is None else dataclasses.asdict(run.dispatcher.cursor(job.name)),
        "is_parked": job.parked is not None,
    }


def restore(run: FusedRun, state: dict[str, Any], tensors: Callable[[str], dict[str, Tensor]]) -> None:
    """Put a run that has been set up, with its config's jobs in the queue, back into a state.

    Args:
        run: nothing of it has been admitted yet.
        state: as ``state_of`` gave it.
        tensors: gives those of a job by its name, as ``FusedRun.tensors`` gave them.

    Raises:
        ValueError: when a job's data is not what it was.
    """
    run.fused_step, run.journal_position = state["fused_step"], state["journal_position"]
    run.queue.refusals = [Refusal(**refusal) for refusal in state["refusals"]]
    run.halving.restore(state["halving"])
    saved = {job_state["name"]: job_state for job_state in state["jobs"]}
    for name, job_state in saved.items():
        if job_state["submitted"] is not None:
            run.take_in(AdapterJob.from_dict(job_state["submitted"]), is_submitted=True)
        job = run.queue.jobs[name]
        _restore_job(job, job_state)
        if job_state["is_parked"]:
            job.parked = tensors(name)
    for name in state["running"]:  # in this order they share a batch
        job = run.queue.jobs[name]
        job.parked = tensors(name)
        run.put_on_model(job)
        run.dispatcher.add(name, job.data.plan, Cursor(**saved[name]["cursor"]))


def _restore_job(job: Job, state: dict[str, Any]) -> None:
    if job.data.fingerprint != state["data"]:
        raise ValueError(
            f"adapter {job.name!r}: its data, or what the tokenizer and the template make of it, has changed since "
            "the run began: give output_dir another name to train on it"
        )
    job.state, job.reason = state["state"], state["reason"]
    job.saved_to = None if state["saved_to"] is None else Path(state["saved_to"])
    job.record = TrainingRecord.from_dict(state["record"])
    job.loss_scale = None if state["loss_scale"] is None else LossScale(**state["loss_scale"])
