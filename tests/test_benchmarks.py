"""Every benchmark runs, in small, and leaves a row."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_default_run(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "default_run.py"
    overrides = ["adapters.*.max_steps=1", "defaults.batch_size=1", "answer_examples=0"]
    subprocess.run([sys.executable, str(script), "--results", str(tmp_path), *overrides], check=True)
    (row,) = [json.loads(line) for line in (tmp_path / "default_run.jsonl").read_text().splitlines()]
    assert row["steps"] == 3 and row["seconds"] > 0 and row["overrides"] == overrides
    assert set(row["held_out_loss"]) == {"orders", "diary", "expenses"}
    assert {"commit", "device", "threads", "versions", "peak_memory_gb", "trained_tokens"} <= set(row)
