"""Rows come back from their file as they were written."""

import math

import pytest

from moe_peft.training.folder.metrics import (
    EvalMetrics,
    ExpertMetrics,
    JobMetrics,
    MetricsWriter,
    StepMetrics,
    read_metrics,
)
from moe_peft.training.folder.rows import typed_rows

STEP = StepMetrics(
    adapter="qa",
    step=1,
    num_steps=2,
    epoch=0.5,
    loss=float("nan"),
    aux_loss=0.0,
    lr=1e-3,
    grad_norm=1.0,
    num_supervised_tokens=3,
    num_tokens=4,
    seconds=1.0,
    tokens_per_second=3.0,
    skipped="loss is nan",
    skipped_steps=1,
)
ROWS = [
    JobMetrics(adapter="qa", state="running"),
    EvalMetrics(adapter="qa", step=0, eval_loss=1.5, num_supervised_tokens=3, fused_step=1),
    ExpertMetrics(adapter="qa", step=1, counts=((1, 2), (3, 4)), fused_step=1),
    JobMetrics(adapter="qa", state="failed", step=1, reason="it broke", saved_to="adapters/qa", fused_step=2),
]


def test_rows_come_back(tmp_path):
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
        for row in (STEP, *ROWS):
            writer.take(row)
    first, *rest = typed_rows(read_metrics(tmp_path / "metrics.jsonl"))
    assert isinstance(first, StepMetrics) and math.isnan(first.loss)
    assert (first.skipped, first.skipped_steps, first.loss_scale) == ("loss is nan", 1, None)
    assert rest[1:2] + rest[3:] == ROWS[1:2] + ROWS[3:] and rest[0] == ROWS[0]
    assert [list(layer) for layer in rest[2].counts] == [[1, 2], [3, 4]]


def test_what_a_later_version_writes_is_passed_over():
    row = {"event": "eval", "adapter": "qa", "step": 1, "eval_loss": 2.0, "num_supervised_tokens": 5, "colour": "red"}
    assert typed_rows([{"event": "weather"}, row]) == [
        EvalMetrics(adapter="qa", step=1, eval_loss=2.0, num_supervised_tokens=5)
    ]


def test_a_row_without_its_field_is_named():
    with pytest.raises(ValueError, match="the event 'eval' has no eval_loss"):
        typed_rows([{"event": "eval", "adapter": "qa", "step": 1, "num_supervised_tokens": 5}])
