"""Alarms of routers: layers that send their tokens to one expert, experts that no token reaches."""

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from moe_peft.training.folder.metrics import ExpertMetrics, JobMetrics, Row

# An expert that gets nine tokens in ten leaves the others nothing to learn from.
COLLAPSE_SHARE = 0.9
# Optimizer steps before a router's state is called more than a mood of its first steps.
ALARM_STEPS = 50
# Where balance itself would be fewer tokens than this, none is no news.
FEWEST_TOKENS = 20
# The steps that a first row is taken to cover when nothing tells where its adapter began.
UNKNOWN_SPAN = 10
# Layers named in one message.
NAMED_LAYERS = 6


class _Watch:
    """One adapter's routers: for how many steps each has been in which state; L routed layers, E experts."""

    def __init__(self, shape: tuple[int, int]) -> None:
        num_layers, _ = shape
        self.collapsed_steps = np.zeros(num_layers, dtype=np.int64)
        self.idle_steps = np.zeros(shape, dtype=np.int64)
        self.missed = np.zeros(shape)  # tokens that balance would have given an idle expert
        self.told_layers = np.zeros(num_layers, dtype=bool)
        self.told_experts = np.zeros(shape, dtype=bool)


class Alarms:
    """Warns once of every layer that has collapsed and of every expert that is dead; a listener to a run's rows.

    The alarms follow from the rows alone: fed with the rows of a ``metrics.jsonl``, it finds the same again.

    Args:
        say: takes each warning, one line.
        top_k: experts a token goes to, by adapter; read when a row comes, so it may grow. An adapter that it does
            not hold counts as one with ``top_k=1``.
        collapse_share: a layer has collapsed when one expert gets more than this share of its tokens.
        num_steps: optimizer steps over which a layer must be collapsed, or an expert without a token.
    """

    def __init__(
        self,
        say: Callable[[str], None],
        top_k: Mapping[str, int],
        *,
        collapse_share: float = COLLAPSE_SHARE,
        num_steps: int = ALARM_STEPS,
    ) -> None:
        self._say = say
        self._top_k = top_k
        self._collapse_share = collapse_share
        self._num_steps = num_steps
        self._watches: dict[str, _Watch] = {}
        self._last_step: dict[str, int] = {}

    def catch_up(self, rows: Iterable[Row]) -> None:
        """Take in the rows of a run that is resumed: what it has warned of is not said again."""
        say, self._say = self._say, lambda text: None
        try:
            for row in rows:
                self.take(row)
        finally:
            self._say = say

    def take(self, row: Row) -> None:
        """Take in one row; those of experts are looked at."""
        if isinstance(row, JobMetrics) and row.state == "running":
            self._last_step.setdefault(row.adapter, row.step)
        if isinstance(row, ExpertMetrics):
            self._look_at(row, np.array(row.counts, dtype=np.int64))

    def _look_at(self, row: ExpertMetrics, counts: np.ndarray) -> None:
        span = row.step - self._last_step.get(row.adapter, row.step - min(UNKNOWN_SPAN, row.step))
        self._last_step[row.adapter] = row.step
        watch = self._watches.setdefault(row.adapter, _Watch(counts.shape))
        num_experts, top_k = counts.shape[1], self._top_k.get(row.adapter, 1)
        tokens = counts.sum(axis=1) / top_k  # [L]
        shares = counts / np.maximum(tokens, 1)[:, None]  # [L, E]: of the layer's tokens that go to each expert

        is_collapsed = (shares.max(axis=1) > self._collapse_share) & (top_k < num_experts)
        watch.collapsed_steps = np.where(is_collapsed, watch.collapsed_steps + span, 0)
        new_layers = (watch.collapsed_steps >= self._num_steps) & ~watch.told_layers
        watch.told_layers |= new_layers
        if new_layers.any():
            self._tell_collapsed(row, np.flatnonzero(new_layers), shares, watch, top_k)

        is_idle = counts == 0
        watch.idle_steps = np.where(is_idle, watch.idle_steps + span, 0)
        watch.missed = np.where(is_idle, watch.missed + (tokens * top_k / num_experts)[:, None], 0.0)
        is_dead = (watch.idle_steps >= self._num_steps) & (watch.missed >= FEWEST_TOKENS)
        new_experts = is_dead & ~watch.told_experts
        watch.told_experts |= new_experts
        if new_experts.any():
            self._tell_dead(row, new_experts, watch)

    def _tell_collapsed(
        self, row: ExpertMetrics, layers: np.ndarray, shares: np.ndarray, watch: _Watch, top_k: int
    ) -> None:
        found = [
            f"layer {layer}, {shares[layer].max():.0%} to expert {shares[layer].argmax()}"
            f" (for {watch.collapsed_steps[layer]} steps)"
            for layer in layers
        ]
        self._say(
            f"Warning: {row.adapter}, step {row.step}: collapsed router: {_listed(found, 'layers')}; "
            f"balance is {top_k / shares.shape[1]:.0%} of a layer's tokens"
        )

    def _tell_dead(self, row: ExpertMetrics, dead: np.ndarray, watch: _Watch) -> None:
        found = []
        for layer in np.flatnonzero(dead.any(axis=1)):
            experts = np.flatnonzero(dead[layer])
            called = "expert" if len(experts) == 1 else "experts"
            found.append(f"layer {layer}, {called} {', '.join(map(str, experts))}")
        self._say(
            f"Warning: {row.adapter}, step {row.step}: dead experts: {_listed(found, 'layers')}: no token in "
            f"{watch.idle_steps[dead].min()} steps, where balance would be {watch.missed[dead].min():,.0f}"
        )


def _listed(items: list[str], noun: str) -> str:
    """``a; b; c``, cut where it would become a page."""
    rest = len(items) - NAMED_LAYERS
    return "; ".join(items[:NAMED_LAYERS]) + (f"; and {rest} more {noun}" if rest > 0 else "")
