"""A sweep: adapters that differ in a few keys, and when the worse of them are dropped."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

from moe_peft import strict
from moe_peft.config.job import ADAPTER_NAME, AdapterJob, require


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The adapters that one entry with lists stands for, and when the worse of them are dropped.

    Args:
        name: what its members' key ``sweep`` says.
        halve_every: optimizer steps between two selections; None: every member trains to its end.
        keep: the share of the members that goes on after a selection, rounded up.
        metric: what is compared: ``eval_loss``, or ``loss``, the mean training loss since the last selection.

    Raises:
        ValueError: naming the field, its value and its rule.
    """

    name: str
    halve_every: int | None = None
    keep: float = 0.5
    metric: Literal["eval_loss", "loss"] = "eval_loss"

    def __post_init__(self) -> None:
        strict.check_fields(self)
        require(self, "name", ADAPTER_NAME.fullmatch(self.name) is not None, "be 1 to 100 letters, digits, _ or -")
        require(self, "halve_every", self.halve_every is None or self.halve_every >= 1, "be at least 1, or null")
        require(self, "keep", 0 < self.keep < 1, "be above 0 and below 1")
        for option in fields(self):
            if option.name in ("keep", "metric") and self.halve_every is None:
                value = getattr(self, option.name)
                if value != option.default:
                    raise ValueError(f"{option.name}={value!r} needs halve_every: without it nothing is compared")


OPTIONS = tuple(key for key in strict.field_names(Sweep) if key != "name")


def check_members(sweep: Sweep, members: Sequence[tuple[str, AdapterJob]]) -> None:
    """Refuses members that could not be compared.

    Args:
        members: each behind the path of its entry in the file, such as ``adapters[1]``; at least one.

    Raises:
        ValueError: when one lacks the data for the metric, or none could reach a selection.
    """
    if sweep.halve_every is None:
        return
    for path, job in members:
        if sweep.metric == "eval_loss" and job.eval_data is None:
            raise ValueError(
                f"{path}.sweep compares eval_loss, so it needs eval_data; with metric: loss the training loss decides"
            )
    limits = [job.max_steps for _, job in members]
    longest = max((limit for limit in limits if limit is not None), default=0)
    if None not in limits and longest <= sweep.halve_every:
        raise ValueError(
            f"{members[0][0]}.sweep has halve_every={sweep.halve_every}, which must be below max_steps={longest}: "
            "no member would reach a selection"
        )


def check_sweeps(sweeps: Sequence[Sweep], places: Sequence[tuple[str, AdapterJob]]) -> None:
    """Refuses sweeps and members that do not belong together.

    Args:
        places: the adapters of the run, each behind the path of its entry in the file.

    Raises:
        ValueError: on a sweep without a member, a member without its sweep, and as :func:`check_members`.
    """
    names = [sweep.name for sweep in sweeps]
    for path, job in places:
        if job.sweep is not None and job.sweep not in names:
            raise ValueError(
                f"{path}.sweep={job.sweep!r} must be the name of one of the run's sweeps"
                f"{strict.nearest(job.sweep, names)}"
            )
    for index, sweep in enumerate(sweeps):
        where = f"sweeps[{index}].name={sweep.name!r}"
        if names.index(sweep.name) != index:
            raise ValueError(f"{where} must be unique: sweeps[{names.index(sweep.name)}] has this name")
        members = [(path, job) for path, job in places if job.sweep == sweep.name]
        if not members:
            raise ValueError(f"{where} must be what some adapter's sweep says: none does")
        check_members(sweep, members)
