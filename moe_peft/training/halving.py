"""Successive halving: at every rung the worse members of a sweep are dropped (https://arxiv.org/abs/1502.07943)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from moe_peft.config import AdapterJob, Sweep


@dataclass(frozen=True)
class Decision:
    """What a selection says of a member that waited for it.

    Args:
        goes_on: whether it trains on; otherwise it is halved.
        reason: in words: ``eval_loss 2.301 at step 20 is rank 3 of 4; 2 go on``.
    """

    goes_on: bool
    reason: str


@dataclass
class _Member:
    """How far a member is in its sweep.

    Args:
        is_living: whether it may still be compared: neither ended nor halved.
        is_waiting: whether it stands at a rung.
        rungs: the rungs it has come to.
        metric: what it is compared by at its rung; None where that is not a finite number.
        loss_sum: of the training losses since its last rung.
        num_losses: of ``loss_sum``.
    """

    is_living: bool = True
    is_waiting: bool = False
    rungs: int = 0
    metric: float | None = None
    loss_sum: float = 0.0
    num_losses: int = 0


class Halving:
    """Decides who goes on in the sweeps of a run that have ``halve_every``.

    A member comes to a rung at each ``halve_every`` optimizer steps of its own and waits there until every living
    member of its sweep has. Then the best ``keep`` of them go on. All of it is a function of the calls alone::

        for each member that has just taken a step and has steps left:
            halving.observe(name, loss)
            if halving.is_rung(name, steps_taken):
                eval_loss = ...                                    # where halving.needs_eval(name)
                decisions = halving.arrive(name, eval_loss)
        for each member that has ended, well or badly:
            decisions = halving.leave(name)                        # the others no longer wait for it

    Args:
        sweeps: of the run.
        jobs: of the run, in the config's order, which decides between equals.
    """

    def __init__(self, sweeps: Sequence[Sweep], jobs: Sequence[AdapterJob]) -> None:
        halved = {sweep.name: sweep for sweep in sweeps if sweep.halve_every is not None}
        self._sweeps = {job.name: halved[job.sweep] for job in jobs if job.sweep in halved}
        self._members = {name: _Member() for name in self._sweeps}

    def needs_eval(self, adapter: str) -> bool:
        """Whether the member is compared by its held-out loss."""
        return adapter in self._sweeps and self._sweeps[adapter].metric == "eval_loss"

    def observe(self, adapter: str, loss: float) -> None:
        """Take in the training loss of an adapter's step; one that is not finite, of a skipped step, does not count."""
        member = self._members.get(adapter)
        if member is not None and math.isfinite(loss):
            member.loss_sum += loss
            member.num_losses += 1

    def is_rung(self, adapter: str, steps_taken: int) -> bool:
        """Whether the adapter has to wait here: it is a member that has come to a rung, and has somebody beside it."""
        member = self._members.get(adapter)
        if member is None or not member.is_living or member.is_waiting:
            return False
        return steps_taken >= self._next_rung(adapter) and len(self._living(adapter)) > 1

    def arrive(self, adapter: str, eval_loss: float | None = None) -> dict[str, Decision]:
        """A member has come to a rung and waits.

        Args:
            eval_loss: of its weights as they are; None where it has none.

        Returns:
            One decision for every member that waited when this was the last to come; nothing otherwise.
        """
        member = self._members[adapter]
        assert member.is_living and not member.is_waiting, f"{adapter} cannot come to a rung"
        metric = eval_loss
        if not self.needs_eval(adapter):
            metric = member.loss_sum / member.num_losses if member.num_losses else None
        member.metric = metric if metric is not None and math.isfinite(metric) else None
        member.is_waiting = True
        member.rungs += 1
        member.loss_sum, member.num_losses = 0.0, 0
        return self._decide(adapter)

    def leave(self, adapter: str) -> dict[str, Decision]:
        """An adapter has ended, well or badly; of one that has left already, or is no member, this says nothing.

        Returns:
            As :meth:`arrive`: it may have been the one that the others waited for.
        """
        member = self._members.get(adapter)
        if member is None or not member.is_living:
            return {}
        member.is_living = member.is_waiting = False
        return self._decide(adapter)

    def _next_rung(self, adapter: str) -> int:
        return (self._members[adapter].rungs + 1) * (self._sweeps[adapter].halve_every or 0)

    def _living(self, adapter: str) -> list[str]:
        """The living members of the adapter's sweep, in the config's order."""
        sweep = self._sweeps[adapter]
        return [name for name, other in self._sweeps.items() if other is sweep and self._members[name].is_living]

    def _decide(self, adapter: str) -> dict[str, Decision]:
        sweep, names = self._sweeps[adapter], self._living(adapter)
        if not all(self._members[name].is_waiting for name in names):
            return {}
        # As a fraction: 0.55 * 100 is a little above 55 in floating point.
        num_kept = math.ceil(Fraction(repr(sweep.keep)) * len(names))
        # sorted keeps the config's order between equals.
        ranked = sorted(names, key=lambda name: _rank(self._members[name].metric))
        decisions = {}
        for rank, name in enumerate(ranked, start=1):
            member = self._members[name]
            value = "not finite" if member.metric is None else f"{member.metric:.4g}"
            step = member.rungs * (sweep.halve_every or 0)
            reason = f"{sweep.metric} {value} at step {step} is rank {rank} of {len(ranked)}; {num_kept} go on"
            decisions[name] = Decision(rank <= num_kept, reason)
            member.is_waiting, member.is_living = False, rank <= num_kept
        return {name: decisions[name] for name in names}

    def state(self) -> dict[str, Any]:
        """All that has happened, as plain data for JSON."""
        return {name: asdict(member) for name, member in self._members.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state` gave, of the same config.

        Raises:
            ValueError: when the members are others.
        """
        if list(state) != list(self._members):
            raise ValueError(f"the state is of the members {list(state)}, not of {list(self._members)}")
        self._members = {name: _Member(**values) for name, values in state.items()}


def _rank(metric: float | None) -> float:
    return math.inf if metric is None else metric
