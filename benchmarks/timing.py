"""Times actions that take turns, so that whatever slows the machine down slows all of them."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Spread:
    """The middle of some measurements and how far they lie apart.

    Args:
        median: half of them are below it.
        p20: a fifth of them are below it.
        p80: a fifth of them are above it.
    """

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least one measurement."""
        if not values:
            raise ValueError("there is no measurement")
        p20, median, p80 = (float(value) for value in np.percentile(values, (20, 50, 80)))
        return cls(median, p20, p80)

    def row(self, digits: int = 4) -> dict[str, float]:
        """For a row of results, rounded to significant digits."""
        return {name: float(f"{value:.{digits}g}") for name, value in asdict(self).items()}

    def __str__(self) -> str:
        return f"{readable(self.median)} ({readable(self.p20)} to {readable(self.p80)})"


def readable(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def seconds_of(action: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """Seconds that an action takes, until its device is done with it."""
    synchronize = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    action()
    synchronize()
    return time.perf_counter() - start


def take_turns(
    actions: Mapping[str, Callable[[int], float]], *, rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Measure actions in turns: every round runs each of them once, every second round in reverse.

    Args:
        actions: of a round's number, counted from 0 with the warm-up's; each returns its seconds.
        rounds: that count.
        warmup: rounds before them that do not.

    Returns:
        The seconds of each action, one a counted round: the same place in two lists is the same round.
    """
    if rounds < 1 or warmup < 0:
        raise ValueError(f"rounds={rounds} must be at least 1 and warmup={warmup} at least 0")
    taken: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(warmup + rounds):
        order = list(actions)[:: 1 if number % 2 == 0 else -1]
        for name in order:
            seconds = actions[name](number)
            if number >= warmup:
                taken[name].append(seconds)
    return taken


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """The spread of the ratios round by round, which drifts of the machine leave alone."""
    return Spread.of([over / under for over, under in zip(numerators, denominators, strict=True)])
