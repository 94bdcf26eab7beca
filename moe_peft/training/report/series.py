"""The numbers of a run as lines that a page can hold: smoothed, thinned, and as tables."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from moe_peft.training.display.plots import SMOOTH_ABOVE_STEPS, moving_average
from moe_peft.training.folder.metrics import Row

R = TypeVar("R", bound=Row)

TABLE_ROWS = 16


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Args:
        name: whose line it is.
        place: which adapter's colour it has.
        x: ``[N]`` optimizer steps, rising.
        y: ``[N]`` values; NaN is a gap.
    """

    name: str
    place: int
    x: np.ndarray
    y: np.ndarray

    def smoothed(self) -> "Series":
        """The moving average of a long line; a short one as it is."""
        if len(self.y) <= SMOOTH_ABOVE_STEPS:
            return self
        return Series(self.name, self.place, self.x, moving_average(self.y, smoothing_span(len(self.y))))

    def thinned(self, most: int) -> "Series":
        """At most about ``most`` points: of each stretch the lowest and the highest, so that no spike is lost."""
        if len(self.x) <= most:
            return self
        kept: list[int] = []
        for stretch in np.array_split(np.arange(len(self.x)), most // 2):
            values = self.y[stretch]
            if np.isfinite(values).any():
                kept += sorted({int(stretch[np.nanargmin(values)]), int(stretch[np.nanargmax(values)])})
            else:
                kept.append(int(stretch[0]))
        # The ends stay: a line must begin and end where it does.
        kept = sorted({0, *kept, len(self.x) - 1})
        return Series(self.name, self.place, self.x[kept], self.y[kept])

    def at(self, step: float) -> float:
        """Its value at a step or, between two, at the one before; NaN outside."""
        if len(self.x) == 0 or step < self.x[0] or step > self.x[-1]:
            return float("nan")
        return float(self.y[np.searchsorted(self.x, step, side="right") - 1])


def smoothing_span(num_steps: int) -> int:
    """Steps that the average of a line of so many looks back over."""
    return max(5, round(num_steps / 25))


def series_of(rows: Iterable[R], name: str, place: int, value: Callable[[R], float]) -> Series:
    """The line of one adapter's rows.

    Args:
        rows: of one adapter and one event.
        value: what the line shows of a row.
    """
    points = [(row.step, value(row)) for row in rows]
    values = np.array(points, dtype=np.float64).reshape(-1, 2)
    values[~np.isfinite(values[:, 1]), 1] = np.nan
    return Series(name, place, values[:, 0], values[:, 1])


def table_rows(lines: Sequence[Series]) -> list[tuple[int, list[float]]]:
    """A few steps and each line's value there: what a table says of a chart."""
    steps = np.unique(np.concatenate([line.x for line in lines])) if lines else np.array([])
    if len(steps) > TABLE_ROWS:
        # The chosen are steps that exist; each line's last is among them, since its end is what one looks for.
        even = steps[np.linspace(0, len(steps) - 1, TABLE_ROWS).round().astype(int)]
        steps = np.unique(np.concatenate([even, [line.x[-1] for line in lines if len(line.x)]]))
    return [(int(step), [line.at(step) for line in lines]) for step in steps]
