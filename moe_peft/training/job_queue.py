"""The jobs of a run: which wait, which run, how each ended."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from moe_peft.config import AdapterJob
from moe_peft.training.adapter_run import AdapterRun, Ending
from moe_peft.training.folder.metrics import FINISHED, UNDER_WAY
from moe_peft.training.loss_scale import LossScale
from moe_peft.training.preparation import JobData
from moe_peft.training.record import TrainingRecord


@dataclass
class Job:
    """An adapter's way through the run, before, while and after its weights are on the model.

    Args:
        settings: what the config, or a submission, says of it.
        data: what it learns from.
        is_submitted: whether it came while the run was on its way.
        state: one of ``metrics.JOB_STATES``.
        reason: why, where the state alone does not say it.
        saved_to: its folder, relative to the run's, once it is saved.
        record: what its training has come to.
        loss_scale: of its gradients, where the base model's dtype needs one.
        run: its training, while its weights are on the model.
        parked: its tensors while it is under way but off the model.
    """

    settings: AdapterJob
    data: JobData
    is_submitted: bool = False
    state: str = "queued"
    reason: str | None = None
    saved_to: Path | None = None
    record: TrainingRecord = field(default_factory=TrainingRecord)
    loss_scale: LossScale | None = None
    run: AdapterRun | None = None
    parked: dict[str, Tensor] | None = None

    @property
    def name(self) -> str:
        """The adapter's name."""
        return self.settings.name

    @property
    def is_under_way(self) -> bool:
        """Whether it has not ended yet."""
        return self.state in UNDER_WAY

    @property
    def is_finished(self) -> bool:
        """Whether it has come to a good end."""
        return self.state in FINISHED

    @property
    def status(self) -> str:
        """State and reason, for a person."""
        return self.state if self.reason is None else f"{self.state}: {self.reason}"

    def end(self, ending: Ending) -> None:
        """Let it end."""
        self.state, self.reason = ending
        self.run = self.parked = None


@dataclass(frozen=True)
class Refusal:
    """A submitted job that could not become one of the run's."""

    name: str
    reason: str


class JobQueue:
    """All jobs in the order in which they came, and the places to train in.

    Args:
        max_concurrent: jobs that train at once; None: all.
    """

    def __init__(self, max_concurrent: int | None) -> None:
        self._max_concurrent = max_concurrent
        self.jobs: dict[str, Job] = {}
        self.refusals: list[Refusal] = []
        self.experts_a_token: dict[str, int] = {}  # of the routed adapters

    def __iter__(self) -> Iterator[Job]:
        return iter(self.jobs.values())

    def check_name(self, name: str) -> None:
        """Refuse a name that is taken; case does not tell names apart, as they become folders.

        Raises:
            ValueError: naming the adapter that has it.
        """
        taken = next((other for other in self.jobs if other.lower() == name.lower()), None)
        if taken is not None:
            raise ValueError(f"name={name!r} must be unique: the run has an adapter {taken!r}")

    def add(self, job: Job) -> None:
        """Put a job, whose name is nobody's yet, at the end of the queue."""
        self.jobs[job.name] = job
        if job.settings.adapter.has_router:
            self.experts_a_token[job.name] = job.settings.adapter.top_k

    def close_free_places(self) -> None:
        """Let no more jobs train at once than do now."""
        self._max_concurrent = len(self.running)

    @property
    def running(self) -> list[Job]:
        """Those that train now."""
        return [job for job in self if job.state == "running"]

    def next_in(self) -> Job | None:
        """The first in the queue, if there is a place for it."""
        if self._max_concurrent is not None and len(self.running) >= self._max_concurrent:
            return None
        return next((job for job in self if job.state == "queued"), None)
