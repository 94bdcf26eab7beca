"""How evenly routers spread their tokens: numbers from the counts of every expert.

L routed layers, E experts.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from moe_peft.training.folder.metrics import ExpertMetrics, Row


def total_counts(rows: Iterable[Row]) -> dict[str, np.ndarray]:
    """The tokens of every expert over the whole of some rows: adapter name to ``[L, E]`` whole numbers."""
    totals: dict[str, np.ndarray] = {}
    for row in rows:
        if isinstance(row, ExpertMetrics):
            counts = np.array(row.counts, dtype=np.int64)
            totals[row.adapter] = totals[row.adapter] + counts if row.adapter in totals else counts
    return totals


def load_shares(counts: np.ndarray) -> np.ndarray:
    """Each expert's share of its layer's routed tokens, ``[L, E]``; NaN in a layer without tokens."""
    totals = counts.sum(axis=1, keepdims=True).astype(np.float64)
    return np.divide(counts, totals, out=np.full(counts.shape, np.nan), where=totals > 0)


def imbalance(counts: np.ndarray) -> np.ndarray:
    """Each layer's largest load over its mean load, ``[L]``: 1 is balance, E/top_k a collapse; NaN without tokens."""
    return load_shares(counts).max(axis=1) * counts.shape[1]


def worst_imbalance(counts: np.ndarray) -> float:
    """The largest of the layers' :func:`imbalance`; NaN without tokens."""
    per_layer = imbalance(counts)
    return float(np.nanmax(per_layer)) if np.isfinite(per_layer).any() else float("nan")


def dead_experts(counts: np.ndarray | Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """``(layer, expert)`` of the experts without a token in layers that had some."""
    counts = np.asarray(counts)
    dead = (counts == 0) & (counts.sum(axis=1, keepdims=True) > 0)
    return [(int(layer), int(expert)) for layer, expert in np.argwhere(dead)]
