"""Numbers from expert counts, against small ones worked out by hand."""

import numpy as np
import pytest

from moe_peft.training.display.expert_load import dead_experts, imbalance, load_shares, total_counts, worst_imbalance
from moe_peft.training.folder.metrics import EvalMetrics, ExpertMetrics

COUNTS = np.array([[10, 10, 10, 10], [0, 30, 10, 0], [0, 0, 0, 0]])


def test_shares_and_imbalance():
    np.testing.assert_allclose(load_shares(COUNTS)[:2], [[0.25] * 4, [0, 0.75, 0.25, 0]])
    assert np.isnan(load_shares(COUNTS)[2]).all()
    np.testing.assert_allclose(imbalance(COUNTS), [1.0, 3.0, np.nan])
    assert worst_imbalance(COUNTS) == 3.0
    assert np.isnan(worst_imbalance(np.zeros((2, 4), dtype=int)))


def test_dead_experts_are_those_a_layer_with_tokens_passes_by():
    assert dead_experts(COUNTS) == [(1, 0), (1, 3)]
    assert dead_experts(((1, 0), (0, 0))) == [(0, 1)]


def test_totals_are_kept_apart_by_adapter():
    rows = [
        ExpertMetrics(adapter="qa", step=10, counts=((1, 2), (3, 4))),
        EvalMetrics(adapter="qa", step=10, eval_loss=1.0, num_supervised_tokens=1),
        ExpertMetrics(adapter="home", step=10, counts=((5,),)),
        ExpertMetrics(adapter="qa", step=20, counts=((10, 20), (30, 40))),
    ]
    totals = total_counts(rows)
    assert {name: counts.tolist() for name, counts in totals.items()} == {"qa": [[11, 22], [33, 44]], "home": [[5]]}
    with pytest.raises(KeyError):
        total_counts(rows[1:2])["qa"]
