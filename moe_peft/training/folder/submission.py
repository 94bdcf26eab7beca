"""Checks what somebody asks of a run before it is put into the run's inbox."""

import dataclasses
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_peft.config import AdapterJob, TrainConfig
from moe_peft.config.file import read_mapping
from moe_peft.config.overrides import parse_override
from moe_peft.data.bundled import PREFIX, bundled_records_path
from moe_peft.data.records import read_records
from moe_peft.data.samples import build_samples
from moe_peft.data.templates import builtin_templates, load_template
from moe_peft.data.tokenizer import Tokenizer, load_tokenizer
from moe_peft.io.source import resolve_source
from moe_peft.strict import field_names, nearest
from moe_peft.training.folder.inbox import Inbox
from moe_peft.training.folder.run_folder import CONFIG_FILE
from moe_peft.training.folder.run_status import JobStatus, RunStatus, read_run

# What a submitted config says of the run itself must be what the run has; these say it in their own way.
_OF_RUN = tuple(
    key for key in field_names(TrainConfig) if key not in ("adapters", "sweeps", "base_model", "output_dir")
)


def read_submission(path: str | Path, overrides: Sequence[str], run: RunStatus) -> list[AdapterJob]:
    """Reads the adapters of a config that are to join a run.

    Args:
        path: a config file; its keys of the run may be left out, base_model too.
        overrides: ``key=value`` strings.
        run: the run they are to join.

    Returns:
        The jobs with every path absolute: the process that trains may have another current folder.

    Raises:
        FileNotFoundError: when the config or a data file does not exist.
        ValueError: on a mistake in the config, a key of the run that disagrees with the run's, a name that is taken, or
            data that cannot be learnt from.
    """
    given = {*read_mapping(path), *(parse_override(override)[0][0] for override in overrides)}
    if "base_model" not in given:
        overrides = [f"base_model={json.dumps(run.config.base_model)}", *overrides]
    config = TrainConfig.from_file(path, overrides)
    try:
        _check_agreement(config, given, run)
        check_names(config.adapters, run)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    tokenizer = _tokenizer(run.config.base_model)
    return [_resolved(job, tokenizer) for job in config.adapters]


def _check_agreement(config: TrainConfig, given: set[str], run: RunStatus) -> None:
    if not _same_source(config.base_model, run.config.base_model):
        raise ValueError(
            f"base_model={config.base_model!r} must be {run.config.base_model!r}, which {run.folder} trains on, or be "
            "left out"
        )
    folder = config.output_dir
    if folder is not None and Path(folder).expanduser().resolve() != run.folder.resolve():
        raise ValueError(f"output_dir={folder!r} must be the run's, {str(run.folder)!r}, or be left out")
    for key in _OF_RUN:
        ours, theirs = getattr(config, key), getattr(run.config, key)
        if key in given and ours not in (theirs, "auto"):
            raise ValueError(f"{key}={ours!r} must be {theirs!r}, as {run.folder} has it, or be left out")
    for sweep in config.sweeps:
        if sweep.halve_every is not None:
            raise ValueError(
                f"the sweep {sweep.name!r} has halve_every={sweep.halve_every}, but submitted adapters are not "
                "compared while they train: leave it out, or make the sweep a run of its own"
            )
        if sweep.name in {theirs.name for theirs in run.config.sweeps}:
            raise ValueError(f"the sweep {sweep.name!r} needs another name: {run.folder} has one of this name")


def _same_source(ours: str, theirs: str) -> bool:
    return ours == theirs or Path(ours).expanduser().resolve() == Path(theirs).expanduser().resolve()


def check_names(jobs: Sequence[AdapterJob], run: RunStatus) -> None:
    """Refuses a name that an adapter of the run has already, case aside.

    Raises:
        ValueError: naming both.
    """
    taken = {job.name.lower(): job for job in run.jobs if job.state != "refused"}
    for job in jobs:
        other = taken.get(job.name.lower())
        if other is not None:
            case = " (names become folders, so case does not tell them apart)" if other.name != job.name else ""
            raise ValueError(
                f"the name {job.name!r} is taken: {run.folder} has an adapter {other.name!r} ({other.state}){case}"
            )


def _tokenizer(base_model: str) -> Tokenizer | None:
    """The run's tokenizer; None where it is not to be had from here, say under the run's own current folder."""
    try:
        resolve_source(base_model, allow_download=False)
    except (OSError, ValueError, ImportError):
        return None
    return load_tokenizer(base_model)


def _resolved(job: AdapterJob, tokenizer: Tokenizer | None) -> AdapterJob:
    """The job with absolute paths, once its data is known to be good."""
    changes: dict[str, Any] = {}
    if job.template not in builtin_templates():
        changes["template"] = _absolute(job.template)
    template = load_template(job.template)
    try:
        for key in ("data", "eval_data"):
            data = getattr(job, key)
            if data is None:
                continue
            is_bundled = data.startswith(PREFIX)
            records_path = bundled_records_path(data) if is_bundled else Path(_absolute(data))
            if not is_bundled:
                changes[key] = str(records_path)
            records = read_records(records_path)
            if tokenizer is not None:
                build_samples(records, tokenizer, template, job.cutoff_len, job.overlong, str(records_path))
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"adapter {job.name!r}: {error}") from error
    return dataclasses.replace(job, **changes)


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def submit(run: RunStatus, jobs: Sequence[AdapterJob]) -> None:
    """Puts jobs into the run's inbox.

    Raises:
        ValueError: when the run is complete, or a name has been taken since ``run`` was read.
    """
    inbox = Inbox(run.folder)
    with inbox.lock():
        now = read_run(run.folder)
        check_takes_requests(now)
        check_names(jobs, now)
        for job in jobs:
            inbox.put_job(job)


def stop(run: RunStatus, names: Sequence[str]) -> None:
    """Puts requests to stop adapters into the run's inbox.

    Raises:
        ValueError: when the run has no such adapter, or it has nothing left to stop.
    """
    inbox = Inbox(run.folder)
    with inbox.lock():
        now = read_run(run.folder)
        found = [find_stoppable(now, name) for name in dict.fromkeys(names)]
        for job in found:
            if job.asked != "stop":
                inbox.put_stop(job.name)


def check_takes_requests(run: RunStatus) -> None:
    """Refuses a run that is complete.

    Raises:
        ValueError: naming the folder.
    """
    if run.is_complete:
        raise ValueError(f"the run in {run.folder} is complete: start a new one for more adapters")


def find_stoppable(run: RunStatus, name: str) -> JobStatus:
    """The job of this name, which must be under way.

    Raises:
        ValueError: naming the nearest adapter that there is, or saying how this one has ended.
    """
    # A refused submission may bear the name of a job that is under way: that one comes last, and is taken.
    known = sorted((job for job in run.jobs if job.job is not None), key=lambda job: job.is_under_way)
    jobs = {job.name: job for job in known}
    if name not in jobs:
        raise ValueError(f"{run.folder} has no adapter {name!r}{nearest(name, jobs)}")
    job = jobs[name]
    if not job.is_under_way:
        reason = f" ({job.reason})" if job.reason else ""
        raise ValueError(f"the adapter {name!r} has ended already, it is {job.state}{reason}: there is nothing to stop")
    return job


def at_resume(folder: Path) -> str:
    """What to tell somebody who asked something of a run that no process trains now."""
    command = f"python -m moe_peft.train {shlex.quote(str(folder / CONFIG_FILE))}"
    return f"No process trains it now; this takes effect when the run is resumed: {command}"
