"""What an adapter's training has come to so far, apart from its weights."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_peft.training.folder.metrics import EvalMetrics


@dataclass
class TrainingRecord:
    """Plain numbers and words, which a checkpoint holds as JSON and which stay when the weights are gone.

    Args:
        steps_taken: optimizer steps, the skipped ones included.
        seconds: wall-clock time of those steps.
        num_skipped: steps that were skipped.
        num_bad: steps in a row, up to now, that were skipped for a loss or gradient that was not finite.
        good_step: the step after which the weights were last known to be good.
        evals: every evaluation.
        best: which of them was the best; kept only under a ``patience``.
        expert_counts: tokens that each expert of each layer got, up to the last row that said so.
        failure: what ended it badly.
        loss: what the micro-batches of the step under way have added up to.
        aux_loss: likewise.
        fault: what has gone wrong in the step under way.
    """

    steps_taken: int = 0
    seconds: float = 0.0
    num_skipped: int = 0
    num_bad: int = 0
    good_step: int = 0
    evals: list[EvalMetrics] = field(default_factory=list)
    best: int | None = None
    expert_counts: list[list[int]] | None = None
    failure: str | None = None
    loss: float = 0.0
    aux_loss: float = 0.0
    fault: str | None = None

    @property
    def best_eval(self) -> EvalMetrics | None:
        """The best evaluation, where there is a ``patience``."""
        return None if self.best is None else self.evals[self.best]

    @property
    def evals_since_best(self) -> int:
        """Evaluations since the best one."""
        return 0 if self.best is None else len(self.evals) - 1 - self.best

    def count_experts(self, counts: list[list[int]]) -> None:
        """Add tokens that the experts got."""
        if self.expert_counts is None:
            self.expert_counts = [[0] * len(layer) for layer in counts]
        self.expert_counts = [
            [total + new for total, new in zip(totals, news, strict=True)]
            for totals, news in zip(self.expert_counts, counts, strict=True)
        ]

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "TrainingRecord":
        """What :meth:`to_dict` gave."""
        return cls(**{**data, "evals": [EvalMetrics(**evaluation) for evaluation in data["evals"]]})
