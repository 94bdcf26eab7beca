"""metrics.jsonl: rows come back as written, valid JSON whatever the numbers, whole whatever the kill."""

import json
import math

import pytest

from moe_peft.training.folder.metrics import EvalMetrics, MetricsWriter, StepMetrics, read_metrics


def make_step(**changes):
    fields = {
        "adapter": "qa",
        "step": 1,
        "num_steps": 10,
        "epoch": 0.1,
        "loss": 2.5,
        "aux_loss": 0.01,
        "lr": 2e-4,
        "grad_norm": 1.5,
        "num_supervised_tokens": 40,
        "num_tokens": 120,
        "seconds": 0.5,
        "tokens_per_second": 80.0,
    }
    return StepMetrics(**{**fields, **changes})


def test_rows_in_order_with_their_event_first(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.take(make_step())
        writer.take(EvalMetrics(adapter="qa", step=1, eval_loss=1.25, num_supervised_tokens=7, fused_step=3))
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["step", "eval"]
    numbers = '"step": 1, "eval_loss": 1.25, "num_supervised_tokens": 7, "fused_step": 3'
    assert lines[1] == '{"event": "eval", "adapter": "qa", ' + numbers + "}"
    assert json.loads(lines[0])["lr"] == 2e-4


def test_every_row_can_be_read_while_the_run_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        for step in (1, 2, 3):
            writer.take(make_step(step=step))
            assert [row["step"] for row in read_metrics(path)] == list(range(1, step + 1))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_numbers_become_null(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.take(make_step(loss=bad))

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    row = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert row["loss"] is None and row["grad_norm"] == 1.5


def test_what_a_run_has_not_is_not_in_its_rows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.take(make_step())
        writer.take(make_step(loss_scale=65536.0, skipped_steps=0))
    without, with_scale = read_metrics(path)
    assert with_scale == {**without, "loss_scale": 65536.0, "skipped_steps": 0}
    assert not {"loss_scale", "skipped_steps"} & without.keys()


def test_appends_behind_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.take(make_step(step=1))
    with path.open("a", encoding="utf-8") as file:
        file.write('{"event": "step", "ada')
    assert [row["step"] for row in read_metrics(path)] == [1]
    with MetricsWriter(path) as writer:
        writer.take(make_step(step=2))
    assert [row["step"] for row in read_metrics(path)] == [1, 2]


@pytest.mark.parametrize("line", ["not json", "[1, 2]", '{"step": 1}'])
def test_a_complete_bad_line_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "step"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        read_metrics(path)
