"""The cases of the plan's benchmark are runs, and its rows read well."""

import pytest
from plan import CASES, _config, measured_plan, measured_run, summary

from moe_peft.training.folder.run_folder import RunFolder
from moe_peft.training.forecast import cost


def test_half_of_the_cases_were_not_fitted_to():
    fitted = [case["fitted"] for case in CASES.values()]
    assert len(fitted) >= 8
    assert 2 * sum(fitted) <= len(fitted)


@pytest.mark.parametrize("name", CASES)
def test_every_case_is_a_config(name, tmp_path):
    config = _config(name, ["seed=3"], tmp_path, is_plan=False)
    assert config.seed == 3
    assert len(config.adapters) == len(CASES[name]["config"]["adapters"])


def test_planned_and_measured(monkeypatch):
    """In small: both sides give the same figures."""
    monkeypatch.setattr(RunFolder, "draw", RunFolder.draw)  # which the benchmark's own process does without
    monkeypatch.setattr(cost, "PROBE_SECONDS", 0.2)
    small = ["adapters.*.max_steps=1", "adapters.*.batch_size=1"]
    planned, real = measured_plan("deep", small), measured_run("deep", small)
    assert planned.keys() - {"parts_mb"} == real.keys()
    assert sum(planned["parts_mb"].values()) == pytest.approx(planned["memory_mb"], abs=1.0)
    assert min(planned["seconds"], real["seconds"], real["memory_mb"]) > 0


def test_a_row_reads_well():
    figures = {"planned": 1234.4, "measured": 1200.0, "ratio": 1.029}
    text = summary({"case": "wide", "fitted": True, "memory_mb": figures, "seconds": figures})
    assert text.split() == ["wide", "+", "1,234", "MB", "1,200", "MB", "1.03", "1,234", "s", "1,200", "s", "1.03"]
