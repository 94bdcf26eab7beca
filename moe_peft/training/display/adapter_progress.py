"""What the console knows of one adapter: its last rows, its pace, the course of its loss."""

import math
from collections import deque

import numpy as np

from moe_peft.training.display.expert_load import dead_experts, worst_imbalance
from moe_peft.training.folder.metrics import EvalMetrics, ExpertMetrics, JobMetrics, StepMetrics

# Pace and share follow the last steps only: they change whenever a neighbour joins or leaves the fused batch.
WINDOW = 20
BLOCKS = "▁▂▃▄▅▆▇█"


class Trend:
    """The course of a number over a whole run, as a few blocks: ``▇▆▄▃▂▁``.

    However long the run, at most ``2 * width`` means are kept: when they are full, each two neighbours become one.
    """

    def __init__(self, width: int = 16) -> None:
        self._width = width
        self._means: list[float] = []
        self._span = 1  # numbers in one mean
        self._rest: list[float] = []

    def add(self, value: float) -> None:
        """Take in the next number; one that is not finite is stepped over."""
        if not math.isfinite(value):
            return
        self._rest.append(value)
        if len(self._rest) < self._span:
            return
        # A new list each time: the console's thread may be reading the old one.
        means = [*self._means, sum(self._rest) / self._span]
        self._rest = []
        if len(means) == 2 * self._width:
            means = [(first + second) / 2 for first, second in zip(means[::2], means[1::2], strict=True)]
            self._span *= 2
        self._means = means

    def blocks(self, width: int) -> str:
        """The course in at most ``width`` characters, its smallest mean the lowest block."""
        means = self._means
        if not means:
            return ""
        groups = np.array_split(np.array(means), min(width, len(means)))
        heights = np.array([group.mean() for group in groups])
        low, reach = heights.min(), np.ptp(heights)
        places = (heights - low) / reach * (len(BLOCKS) - 1) if reach else np.zeros(len(heights))
        return "".join(BLOCKS[round(place)] for place in places)


class AdapterProgress:
    """One adapter's state, filled by its rows.

    Args:
        num_steps: its optimizer steps; 0 while nobody knows.
    """

    def __init__(self, num_steps: int = 0) -> None:
        self.num_steps = num_steps
        self.state = "queued"
        self.reason: str | None = None
        self.last: StepMetrics | None = None
        self.evals: list[EvalMetrics] = []
        self.trend = Trend()
        self.counts: np.ndarray | None = None  # of its latest experts row
        self.line_time = -math.inf  # when its last plain line was printed
        self._start: int | None = None  # the fused step it was admitted at
        # Of each of its last steps: its number, its time (None: of a run before a resume), its fused step, its tokens.
        self._recent: deque[tuple[int, float | None, int, int]] = deque(maxlen=WINDOW + 1)

    @property
    def current_step(self) -> int:
        """Optimizer steps taken."""
        return self.last.step if self.last is not None else 0

    @property
    def num_skipped(self) -> int:
        """Its steps that were skipped."""
        return (self.last.skipped_steps if self.last is not None else None) or 0

    def take_step(self, row: StepMetrics, now: float | None) -> None:
        """Take in an optimizer step.

        Args:
            now: the time; None for a step of before a resume, which tells nothing of today's pace.
        """
        if self.state == "queued":
            self.state = "running"
        self.last = row
        self.num_steps = row.num_steps
        self.trend.add(row.loss)
        self._recent.append((row.step, now, row.fused_step, row.num_tokens))

    def take_job(self, row: JobMetrics) -> None:
        """Take in a change of its state."""
        if row.state == "running":
            self._start = row.fused_step
        self.state, self.reason = row.state, row.reason

    def take_experts(self, row: ExpertMetrics) -> None:
        """Take in the tokens of its experts."""
        self.counts = np.array(row.counts, dtype=np.int64)

    def eta(self) -> float | None:
        """Seconds until its last step at the pace of its latest ones; None before the first."""
        if self.last is None:
            return None
        timed = [(step, time) for step, time, _, _ in tuple(self._recent) if time is not None]
        if len(timed) < 2:
            pace = self.last.seconds
        else:
            (first_step, first_time), (last_step, last_time) = timed[0], timed[-1]
            pace = (last_time - first_time) / (last_step - first_step)
        return pace * (self.num_steps - self.last.step)

    def budget_share(self, max_batch_tokens: int) -> float | None:
        """Its tokens over those that its latest fused steps had room for; None where that is not known."""
        recent = tuple(self._recent)
        if not recent:
            return None
        if self._start is None or len(recent) > WINDOW:
            (_, _, first, _), *rest = recent  # the oldest only tells where the others began
        else:
            first, rest = self._start, list(recent)
        passes = rest[-1][2] - first if rest else 0
        return sum(tokens for *_, tokens in rest) / (passes * max_batch_tokens) if passes > 0 else None

    def experts_text(self) -> str:
        """The worst layer's largest load over its mean, and the experts that got nothing lately: ``1.8× 2 dead``."""
        if self.counts is None:
            return ""
        num_dead = len(dead_experts(self.counts))
        return f"{worst_imbalance(self.counts):.1f}×" + (f" {num_dead} dead" if num_dead else "")
