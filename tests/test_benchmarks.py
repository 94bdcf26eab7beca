"""Every benchmark runs, in small, and leaves rows that the report reads."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moe_peft.adapters import METHODS
from moe_peft.data.bundled import bundled_records_path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT_KEYS = {"commit", "device", "threads", "versions"}


def run(script: str, *arguments: object) -> str:
    """What a benchmark prints."""
    command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def is_ordered(spread: dict[str, float]) -> bool:
    return 0 < spread["p20"] <= spread["median"] <= spread["p80"]


TINY = ("--preset", "tiny", "--device", "cpu", "--samples", 4, "--steps", 2, "--warmup", 1)


@pytest.mark.slow
def test_default_run(tmp_path: Path) -> None:
    held_out = bundled_records_path("bundled:orders:eval").read_text(encoding="utf-8").splitlines()
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(held_out[:2]), encoding="utf-8")
    overrides = ["adapters.*.max_steps=1", "defaults.batch_size=1", "answer_examples=0", f"adapters.*.eval_data={few}"]
    run("default_run.py", "--results", tmp_path, *overrides)
    (row,) = rows(tmp_path, "default_run")
    assert row["steps"] == 3 and row["seconds"] > 0 and row["overrides"] == overrides
    assert set(row["held_out_loss"]) == {"orders", "diary", "expenses"}
    assert {*ENVIRONMENT_KEYS, "peak_memory_gb", "trained_tokens"} <= set(row)


@pytest.mark.slow
def test_step_leaves_a_row_a_variant(tmp_path: Path) -> None:
    settings = ("--tokens", 36, "--supervised", 0.5, "--rank", 3, "--experts", 3)
    printed = run("step.py", *TINY, *settings, "--compare", "lora", "2xmixlora", "--results", tmp_path)
    lora, mixture = rows(tmp_path, "step")
    for row in (lora, mixture):
        assert row["case"] in printed
        assert set(row) >= ENVIRONMENT_KEYS
        assert row["rank"] == 3 and row["supervised"] == 0.5 and row["tokens"] == 36
        for name in ("seconds", "tokens_per_second", "supervised_per_second", "gemm_share", "ratio"):
            assert is_ordered(row[name]), name
        # 9 tokens a sample, of which the last 9 - round(4.5) = 5 carry a loss
        rate = row["supervised_per_second"]["median"] / row["tokens_per_second"]["median"]
        assert rate == pytest.approx(5 / 9, rel=2e-3)
        assert 0.1 < row["peak_memory_gb"] < 2.0
        assert row["ratio_to"] == "lora"
    assert lora["ratio"]["median"] == 1.0
    assert (mixture["method"], mixture["adapters"], mixture["compared"]) == ("mixlora", 2, ["lora", "2xmixlora"])


@pytest.mark.slow
def test_step_takes_lengths_and_answers_from_records(tmp_path: Path) -> None:
    data = tmp_path / "records.jsonl"
    record = {"instruction": "Say it again", "input": "word " * 30, "output": "word"}
    data.write_text("".join(json.dumps(record) + "\n" for _ in range(12)))
    run("step.py", *TINY, "--no-memory", "--lengths", "real", "--data", data, "--results", tmp_path)
    (row,) = rows(tmp_path, "step")
    assert row["data"] == [f"{tmp_path.name}/records.jsonl"] and row["peak_memory_gb"] is None
    assert 0 < row["supervised_per_second"]["median"] < 0.1 * row["tokens_per_second"]["median"]


@pytest.mark.slow
def test_peers_runs_ours_beside_the_real_peft(tmp_path: Path) -> None:
    settings = ("--tokens", 32, "--cases", "peft-lora-fp32", "--python-peft", sys.executable, "--num-threads", 1)
    printed = run("peers.py", *TINY, *settings, "--cache", tmp_path / "cache", "--results", tmp_path)
    (row,) = rows(tmp_path, "peers")
    assert row["case"] in printed and set(row) >= ENVIRONMENT_KEYS
    assert (
        is_ordered(row["ratio"]) and row["mode"] == "float32" and {"peft", "transformers"} <= set(row["peer_versions"])
    )
    for side in ("ours", "theirs"):
        assert is_ordered(row[side]["tokens_per_second"]) and 0.1 < row[side]["peak_memory_gb"] < 2.0
        assert row[side]["threads"] == 1
    assert row["ours"]["first_loss"] == pytest.approx(row["theirs"]["first_loss"], abs=2e-3)

    picture_folder, readme = tmp_path / "docs", tmp_path / "README.md"
    readme.write_text("above\n<!-- benchmarks:begin -->\nold\n<!-- benchmarks:end -->\nbelow\n")
    run("report.py", "--results", tmp_path, "--readme", readme, "--pictures", picture_folder)
    above, *table, below = readme.read_text().splitlines()
    assert (above, below) == ("above", "below") and "old" not in table
    assert any(row["case"] in line and f"{row['ratio']['median']:.2f}x" in line for line in table)
    assert (picture_folder / "benchmarks-peers.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_many_adapters_fused_and_one_after_another(tmp_path: Path) -> None:
    settings = ("--preset", "tiny", "--adapters", 1, 2, 4, "--longest", 20, "--dtype", "float32", "--rounds", 2)
    peft = ("--python-peft", sys.executable, "--num-threads", 1, "--cache", tmp_path / "cache")
    printed = run("many_adapters.py", *settings, *peft, "--results", tmp_path)
    (row,) = rows(tmp_path, "many_adapters")
    assert row["case"] in printed and set(row) >= ENVIRONMENT_KEYS
    assert list(row["fused"]) == ["1", "2", "4"] and 4 * 2 * 16 <= row["tokens"] <= 4 * 2 * 20
    for figures in (*row["fused"].values(), row["peft"]):
        assert is_ordered(figures["tokens_per_second"]) and is_ordered(figures["ratio"])
        assert 0.1 < figures["peak_memory_gb"] < 2.0
    assert row["fused"]["1"]["ratio"]["median"] == row["peft"]["ratio_to_peft"]["median"] == 1.0

    readme = tmp_path / "README.md"
    readme.write_text("<!-- benchmarks:begin -->\n<!-- benchmarks:end -->\n")
    run("report.py", "--results", tmp_path, "--readme", readme, "--pictures", tmp_path)
    assert "4 fused" in readme.read_text()
    assert (tmp_path / "benchmarks-many-adapters.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_methods_trains_every_method(tmp_path: Path) -> None:
    printed = run("methods.py", *TINY[:6], "--steps", 4, "--dtype", "float32", "--no-memory", "--results", tmp_path)
    found = {row["method"]: row for row in rows(tmp_path, "methods")}
    assert list(found) == list(METHODS)
    for method, row in found.items():
        assert method in printed and set(row) >= ENVIRONMENT_KEYS and row["trainable"] > 0, method
        assert is_ordered(row["tokens_per_second"]) and is_ordered(row["ratio"])
        assert 0 < row["last_loss"] < 2 * row["first_loss"], method
    assert found["lora"]["ratio"]["median"] == 1.0

    readme, page = tmp_path / "README.md", tmp_path / "methods.md"
    for path in (readme, page):
        path.write_text("<!-- benchmarks:begin -->\n<!-- benchmarks:end -->\n")
    run("report.py", "--results", tmp_path, "--readme", readme, "--pictures", tmp_path)
    assert all(f"| {method} |" in page.read_text() for method in METHODS)


@pytest.mark.slow
def test_methods_measures_memory_of_a_method_alone(tmp_path: Path) -> None:
    run("methods.py", *TINY[:6], "--steps", 3, "--dtype", "float32", "--methods", "lora", "--results", tmp_path)
    (row,) = rows(tmp_path, "methods")
    assert 0.1 < row["peak_memory_gb"] < 2.0
