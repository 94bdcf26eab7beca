"""How far every job of a run is, read from the files in the run's folder."""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_peft.config import AdapterJob, TrainConfig
from moe_peft.strict import did_you_mean
from moe_peft.training.folder.inbox import Inbox, Request
from moe_peft.training.folder.journal import FILE as JOURNAL_FILE
from moe_peft.training.folder.journal import read_journal
from moe_peft.training.folder.metrics import UNDER_WAY, read_metrics
from moe_peft.training.folder.run_folder import CONFIG_FILE
from moe_peft.training.folder.run_lock import holder

METRICS_FILE = "metrics.jsonl"
# A job's pace is that of its latest steps: it changes whenever a neighbour joins or leaves the fused batch.
PACE_WINDOW = 20


@dataclass(frozen=True, kw_only=True)
class JobStatus:
    """A job of a run.

    Args:
        name: of its adapter.
        state: one of ``moe_peft.training.folder.metrics.JOB_STATES``.
        job: its settings; None for a request that was refused because it says no job.
        step: optimizer steps taken.
        num_steps: all it will take; None where nobody knows yet.
        loss: of its last step; None before the first, and where it was not finite.
        evals: pairs of optimizer step and held-out loss, in order; None for a loss that was not finite.
        tokens_per_second: supervised tokens a second over its latest steps; None before the first.
        num_supervised_tokens: those it has learnt from so far.
        num_tokens: those it has read so far, prompts included.
        seconds: that its steps took.
        skipped_steps: steps left out because their loss or gradient was not finite.
        reason: why it is in its state, where the run says so.
        saved_to: the adapter's folder; None while it is not saved.
        asked: what was asked of the run and has not happened yet: ``submit``, ``stop`` or None.
    """

    name: str
    state: str
    job: AdapterJob | None
    step: int = 0
    num_steps: int | None = None
    loss: float | None = None
    evals: tuple[tuple[int, float | None], ...] = ()
    tokens_per_second: float | None = None
    num_supervised_tokens: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    skipped_steps: int = 0
    reason: str | None = None
    saved_to: Path | None = None
    asked: str | None = None

    @property
    def is_under_way(self) -> bool:
        """Whether it may still take a step."""
        return self.state in UNDER_WAY

    @property
    def eval_loss(self) -> float | None:
        """The latest held-out loss."""
        return self.evals[-1][1] if self.evals else None

    @property
    def best_eval_loss(self) -> float | None:
        """The lowest held-out loss."""
        return min((loss for _, loss in self.evals if loss is not None), default=None)


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """A run as its folder shows it.

    Args:
        folder: of the run.
        config: what it was started with; submitted jobs are not in it.
        trained_by: the process that trains it now, in words; None when there is none.
        is_complete: nothing is left to do, and no request is taken any more.
        jobs: in the config's order, then submitted ones as they came, then what was refused.
    """

    folder: Path
    config: TrainConfig
    trained_by: str | None
    is_complete: bool
    jobs: tuple[JobStatus, ...]


def read_run(folder: str | Path) -> RunStatus:
    """Reads a run's folder, whether a process trains in it at the moment or not.

    Raises:
        FileNotFoundError: there is no such folder; says the nearest name that there is.
        ValueError: it is not the folder of a run, or a file in it is damaged.
    """
    folder = Path(folder).expanduser()
    config = _read_config(folder)
    # A request goes from the inbox to the journal to the metrics: read in this order, none is missed on its way.
    inbox = Inbox(folder)
    is_closed, waiting = inbox.is_closed, inbox.take()
    entries = [entry.request for entry in read_journal(folder / JOURNAL_FILE)]
    trained_by = holder(folder)
    metrics = folder / METRICS_FILE
    rows = read_metrics(metrics) if metrics.exists() else []

    jobs = _Jobs()
    for job in config.adapters:
        jobs.add(job.name, job, is_settled=True)
    for request in entries:
        if request.job is not None:
            jobs.add(request.adapter, request.job)
    for row in rows:
        jobs.take(row)
    known = {request.id for request in entries}
    jobs.ask([request for request in entries if request.action == "stop"])
    jobs.ask([request for request in waiting if request.id not in known])
    found = tuple(record.status(folder) for record in jobs.records)
    return RunStatus(folder=folder, config=config, trained_by=trained_by, is_complete=is_closed, jobs=found)


def _read_config(folder: Path) -> TrainConfig:
    if not folder.is_dir():
        siblings = [str(entry) for entry in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise FileNotFoundError(f"there is no run folder {folder}{did_you_mean(str(folder), siblings)}")
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"{folder} has no {CONFIG_FILE}: it is not the folder of a training run")
    return TrainConfig.from_file(folder / CONFIG_FILE)


class _Record:
    """A job while its rows are being read.

    Args:
        is_settled: the run has it in its config, or has said something of it.
    """

    def __init__(self, name: str, job: AdapterJob | None, *, is_settled: bool, asked: str | None = None) -> None:
        self.is_settled = is_settled
        self.state = "queued"
        self.values: dict[str, Any] = {"name": name, "job": job, "asked": asked}
        if job is not None:
            self.values["num_steps"] = job.max_steps
        self._evals: list[tuple[int, float | None]] = []
        self._latest: deque[Mapping[str, Any]] = deque(maxlen=PACE_WINDOW)
        self._sums: dict[str, Any] = dict.fromkeys(("num_supervised_tokens", "num_tokens", "seconds"), 0)

    def take(self, row: Mapping[str, Any]) -> None:
        self.is_settled = True
        event, values = row["event"], self.values
        if event == "job":
            self.state = row["state"]
            values.update(step=row["step"], reason=row.get("reason"))
            values["saved_to"] = row.get("saved_to", values.get("saved_to"))
        elif event == "eval":
            self._evals.append((row["step"], row["eval_loss"]))
        elif event == "step":
            self._latest.append(row)
            if self.state == "queued":
                self.state = "running"
            values.update(step=row["step"], num_steps=row["num_steps"], loss=row["loss"])
            values["skipped_steps"] = row.get("skipped_steps", 0)
            for key in self._sums:
                self._sums[key] += row[key]

    def status(self, folder: Path) -> JobStatus:
        seconds = sum(row["seconds"] for row in self._latest)
        tokens = sum(row["num_supervised_tokens"] for row in self._latest)
        saved_to = self.values.pop("saved_to", None)
        return JobStatus(
            state=self.state,
            evals=tuple(self._evals),
            tokens_per_second=tokens / seconds if seconds > 0 else None,
            saved_to=None if saved_to is None else folder / saved_to,
            **self._sums,
            **self.values,
        )


class _Jobs:
    """The jobs of a run while its files are being read.

    Two may bear one name: a second submission of a job that runs is refused, and a refused one can be mended and
    submitted again.
    """

    def __init__(self) -> None:
        self.records: list[_Record] = []
        self._by_name: dict[str, list[_Record]] = {}

    def add(self, name: str, job: AdapterJob | None, *, is_settled: bool = False, asked: str | None = None) -> _Record:
        record = _Record(name, job, is_settled=is_settled, asked=asked)
        self.records.append(record)
        self._by_name.setdefault(name, []).append(record)
        return record

    def take(self, row: Mapping[str, Any]) -> None:
        name = str(row.get("adapter"))
        if row.get("state") == "refused":
            # Of a request that could not be read there is no record yet.
            record = self._unsettled(name) or self.add(name, None)
        else:
            found = self._live(name) or self._unsettled(name)
            if found is None:  # a row of no job, such as those of the run itself
                return
            record = found
        record.take(row)

    def ask(self, requests: Iterable[Request]) -> None:
        """Note what has not happened yet."""
        for request in requests:
            record = self._live(request.adapter) or self._unsettled(request.adapter)
            if request.job is not None:
                self.add(request.adapter, request.job, asked="submit")
            elif request.action == "stop" and record is not None and record.state in UNDER_WAY:
                record.values["asked"] = "stop"

    def _live(self, name: str) -> _Record | None:
        """The job of this name that the run has taken in."""
        found = reversed(self._by_name.get(name, []))
        return next((record for record in found if record.is_settled and record.state != "refused"), None)

    def _unsettled(self, name: str) -> _Record | None:
        """The oldest submission of this name of which the run has said nothing."""
        return next((record for record in self._by_name.get(name, []) if not record.is_settled), None)
