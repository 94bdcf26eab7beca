"""TensorBoard's own reader finds the numbers that went in."""

import importlib.util
import sys

import numpy as np
import pytest

from moe_peft.training.display.scalars import Scalars, check_tensorboard
from moe_peft.training.folder.metrics import EvalMetrics, ExpertMetrics, JobMetrics, StepMetrics

needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="needs the extra tensorboard"
)


def make_step(step, adapter="qa", **changes):
    fields = {
        "adapter": adapter,
        "step": step,
        "num_steps": 50,
        "epoch": 0.5,
        "loss": 3.0 - 0.1 * step,
        "aux_loss": 0.0,
        "lr": 1e-3,
        "grad_norm": 1.5,
        "num_supervised_tokens": 30,
        "num_tokens": 90,
        "seconds": 2.0,
        "tokens_per_second": 15.0,
    }
    return StepMetrics(**{**fields, **changes})


def read(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0})
    events.Reload()
    return events


def points(events, tag):
    return [(event.step, pytest.approx(event.value)) for event in events.Scalars(tag)]


@needs_tensorboard
def test_each_adapter_has_its_curves(tmp_path):
    scalars = Scalars(tmp_path)
    scalars.take(JobMetrics(adapter="qa", state="running"))
    scalars.take(EvalMetrics(adapter="qa", step=0, eval_loss=2.5, num_supervised_tokens=9))
    for step in (1, 2, 3):
        scalars.take(make_step(step))
        scalars.take(make_step(step, "home", aux_loss=0.04, skipped_steps=1))
    scalars.close()
    scalars.close()
    assert {path.name for path in tmp_path.iterdir()} == {"qa", "home"}
    qa, home = read(tmp_path / "qa"), read(tmp_path / "home")
    assert points(qa, "loss/training") == [(1, 2.9), (2, 2.8), (3, 2.7)]
    assert points(qa, "loss/held-out") == [(0, 2.5)]
    assert points(qa, "speed/tokens_per_second") == [(1, 45.0), (2, 45.0), (3, 45.0)]
    assert "loss/router" not in qa.Tags()["scalars"] and "step/skipped" not in qa.Tags()["scalars"]
    assert points(home, "loss/router")[0] == (1, 0.04) and points(home, "step/skipped")[-1] == (3, 1.0)


@needs_tensorboard
def test_expert_load_is_a_histogram_over_the_experts(tmp_path):
    scalars = Scalars(tmp_path)
    scalars.take(ExpertMetrics(adapter="qa", step=10, counts=((30, 0, 10, 20), (15, 15, 15, 15))))
    scalars.close()
    events = read(tmp_path / "qa")
    assert set(events.Tags()["histograms"]) == {"expert_load/layer_00", "expert_load/layer_01"}
    (histogram,) = events.Histograms("expert_load/layer_00")
    value = histogram.histogram_value
    assert (histogram.step, value.num, value.min, value.max) == (10, 60, 0, 3)
    # What lies in the bucket around an expert's number, whatever empty buckets stand between.
    edges = np.array(value.bucket_limit)
    counts = [sum(np.array(value.bucket)[(edges > expert - 0.5) & (edges <= expert + 0.5)]) for expert in range(4)]
    assert counts == [30, 0, 10, 20]
    assert points(events, "experts/largest_over_mean") == [(10, 2.0)]
    assert points(events, "experts/dead") == [(10, 1.0)]
    assert points(events, "experts_largest_over_mean/layer_01") == [(10, 1.0)]


@needs_tensorboard
def test_a_resumed_run_replaces_what_was_lost(tmp_path):
    killed = Scalars(tmp_path)
    for step in range(1, 8):
        killed.take(make_step(step))
    resumed = Scalars(tmp_path)  # `killed` was never closed
    for step in range(5, 10):
        resumed.take(make_step(step, loss=9.0))
    resumed.close()
    killed.close()
    events = read(tmp_path / "qa")
    assert [event.step for event in events.Scalars("loss/training")] == list(range(1, 10))
    assert [event.value for event in events.Scalars("loss/training")][4:] == [9.0] * 5


@needs_tensorboard
def test_a_killed_run_has_every_row_on_disk(tmp_path):
    scalars = Scalars(tmp_path)
    for step in (1, 2, 3):
        scalars.take(make_step(step))
        assert [event.step for event in read(tmp_path / "qa").Scalars("loss/training")] == list(range(1, step + 1))
    scalars.close()


def test_without_the_package_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ValueError, match=r"tensorboard=true needs .* pip install 'moe-peft-torch\[tensorboard\]'"):
        check_tensorboard()
    with pytest.raises(ValueError, match="tensorboard=true"):
        Scalars(tmp_path / "new")
    assert not (tmp_path / "new").exists()
