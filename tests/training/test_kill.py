"""A process that is killed with SIGKILL at ten random moments, and started again each time, ends in the same bits."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from resuming import assert_same_run
from tiny_run import adapter_entry, run_config

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_pictures")]

NUM_KILLS = 10
MIXTURE = {"method": "mixlora", "num_experts": 4}
# The trainer's own command, without pictures: they would take longer than the run.
COMMAND = """
import sys
from moe_peft.train import main
from moe_peft.training.folder.run_folder import RunFolder
RunFolder.draw = lambda self, counts: None
sys.exit(main(sys.argv[1:]))
"""


def start(config_file: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(config_file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def test_sigkill_at_ten_random_moments(base: Path, data: str, held_out: str, tmp_path: Path) -> None:
    entries = [
        adapter_entry(
            "mix",
            data,
            method="mixlora",
            num_experts=4,
            lora_dropout=0.1,
            batch_size=6,
            micro_batch_size=2,
            max_steps=40,
        ),
        adapter_entry("qa", data, lora_dropout=0.1, batch_size=3, max_steps=60, eval_data=held_out, eval_steps=7),
        adapter_entry("late", data, batch_size=5, micro_batch_size=1, max_steps=12, eval_data=held_out),
    ]
    changes = {"max_concurrent_adapters": 2, "save_steps": 2, "max_batch_tokens": 200, "num_threads": 1}
    files = {}
    for name in ("undisturbed", "run"):
        config = run_config(base, tmp_path / name, *entries, **changes)
        files[name] = tmp_path / f"{name}.json"
        files[name].write_text(json.dumps(config.to_dict()))
    undisturbed = start(files["undisturbed"])
    text, _ = undisturbed.communicate(timeout=500)
    assert undisturbed.returncode == 0, text

    moments = random.Random(3)
    metrics = tmp_path / "run" / "metrics.jsonl"
    total = size_of(tmp_path / "undisturbed" / "metrics.jsonl")
    for number in range(NUM_KILLS):
        # Where the run is when it dies goes with its rows, not with how busy the machine is; the rest is chance.
        goal = total * (number + moments.random()) / NUM_KILLS * 0.95
        process = start(files["run"])
        while process.poll() is None and size_of(metrics) < goal:
            time.sleep(0.001)
        time.sleep(moments.random() * 0.02)
        assert process.poll() is None, process.communicate()[0]
        process.kill()
        process.communicate()
    assert not (tmp_path / "run" / "leaderboard.json").exists(), "it was to be killed before its end"
    last = start(files["run"])
    text, _ = last.communicate(timeout=500)
    assert last.returncode == 0, text
    assert "Going on from " in text
    assert_same_run(tmp_path / "run", tmp_path / "undisturbed")
