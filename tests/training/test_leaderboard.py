"""The leaderboard of a run, told from a folder whose files are written here by hand."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from moe_peft.config import TrainConfig
from moe_peft.training.folder.leaderboard import leaderboard, write_leaderboard
from moe_peft.training.folder.metrics import EvalMetrics, JobMetrics, MetricsWriter, Row, StepMetrics

QA = {"name": "qa", "method": "lora", "data": "qa.jsonl", "eval_data": "held-out.jsonl", "eval_steps": 2}


class Run:
    """A run's folder and the rows that a trainer would write into it."""

    def __init__(self, folder: Path, *entries: Mapping[str, Any]) -> None:
        self.folder = folder
        self.config = TrainConfig.from_dict(
            {"base_model": "base", "output_dir": str(folder), "adapters": [dict(entry) for entry in entries]}
        )
        folder.mkdir(exist_ok=True)
        (folder / "config.yaml").write_text(self.config.to_yaml())

    def _write(self, row: Row) -> None:
        with MetricsWriter(self.folder / "metrics.jsonl") as metrics:
            metrics.take(row)

    def train(self, name: str, losses: Iterable[float], evals: Mapping[int, float] | None = None) -> None:
        """Steps of 10 supervised ones of 30 tokens in half a second, and evaluations by step."""
        evals = evals or {}
        for step, loss in enumerate(losses, start=1):
            if step == 1 and 0 in evals:
                self._eval(name, 0, evals[0])
            self._write(
                StepMetrics(
                    adapter=name,
                    step=step,
                    num_steps=20,
                    epoch=0.1,
                    loss=loss,
                    aux_loss=0.0,
                    lr=1e-3,
                    grad_norm=1.0,
                    num_supervised_tokens=10,
                    num_tokens=30,
                    seconds=0.5,
                    tokens_per_second=20.0,
                )
            )
            if step in evals:
                self._eval(name, step, evals[step])

    def _eval(self, name: str, step: int, loss: float) -> None:
        self._write(EvalMetrics(adapter=name, step=step, eval_loss=loss, num_supervised_tokens=5))

    def end(
        self, name: str, state: str, step: int = 2, *, num_saved: int | None = None, reason: str | None = None
    ) -> None:
        """The job's last row, and its weights where it has any."""
        saved_to = None
        if num_saved is not None:
            saved_to = f"adapters/{name}"
            (self.folder / saved_to).mkdir(parents=True)
            weights = {"a": np.zeros((num_saved - 3, 1), np.float32), "b": np.zeros(3, np.float32)}
            save_file(weights, self.folder / saved_to / "adapter_model.safetensors")
        self._write(JobMetrics(adapter=name, state=state, step=step, reason=reason, saved_to=saved_to))


def rows_of(table: Mapping[str, Any], *keys: str) -> list[Any]:
    return [tuple(row[key] for key in keys) if len(keys) > 1 else row[keys[0]] for row in table["rows"]]


def test_seeds_share_a_row_with_mean_and_deviation_and_the_best_row_is_first(tmp_path: Path) -> None:
    run = Run(tmp_path, {**QA, "lr": [1e-4, 2e-4], "r": [8, 16], "seed": [0, 1, 2]})
    losses = {"lr1e-4-r8": (3.0, 3.5, 4.0), "lr1e-4-r16": (2.0, 2.25, 2.0), "lr2e-4-r8": (9.0, 8.0, 7.0)}
    losses["lr2e-4-r16"] = (2.0, 2.0, 2.0)
    for label, finals in losses.items():
        for seed, final in enumerate(finals):
            run.train(f"qa-{label}-seed{seed}", [5.0, 4.0], {0: 6.0, 2: final})
            run.end(f"qa-{label}-seed{seed}", "done", num_saved=100 + seed)
    (sweep,) = leaderboard(tmp_path)["sweeps"]
    assert {key: sweep[key] for key in ("name", "halve_every", "keys")} == {
        "name": "qa",
        "halve_every": None,
        "keys": ["r", "lr"],
    }
    assert rows_of(sweep, "label") == ["qa-lr2e-4-r16", "qa-lr1e-4-r16", "qa-lr1e-4-r8", "qa-lr2e-4-r8"]
    assert rows_of(sweep, "settings")[0] == {"lr": 2e-4, "r": 16}
    assert rows_of(sweep, "adapters")[2] == [f"qa-lr1e-4-r8-seed{seed}" for seed in range(3)]
    for row in sweep["rows"]:
        finals = losses[row["label"].removeprefix("qa-")]
        assert row["eval_loss"] == {"mean": np.mean(finals), "std": pytest.approx(np.std(finals, ddof=1)), "count": 3}
        assert row["train_loss"]["mean"] == 4.5
        assert (row["num_trainable"]["mean"], row["num_tokens"]["mean"], row["seconds"]["mean"]) == (101, 60, 1.0)
        assert row["states"] == {"done": 3}


def test_the_loss_is_that_of_the_saved_weights(tmp_path: Path) -> None:
    names = ["last", "best", "failed", "stopped", "unseen"]
    entries = [{**QA, "name": name, "r": rank} for rank, name in enumerate(names, start=1)]
    entries[1]["patience"] = 2
    run = Run(tmp_path, *entries)
    run.train("last", [5.0, 4.0, 3.0, 2.0], {0: 9.0, 2: 1.0, 4: 2.0})
    run.end("last", "done", 4)
    run.train("best", [5.0, 4.0, 3.0, 2.0], {0: 9.0, 2: 1.5, 4: 2.0})
    run.end("best", "early-stopped", 4)
    run.train("failed", [5.0, 4.0], {0: 9.0, 2: 0.5})
    run.end("failed", "failed", reason="the loss is not finite")
    run.train("stopped", [5.0, 4.0, 3.0], {0: 9.0, 2: 1.75})
    run.end("stopped", "stopped", 3)
    run.train("unseen", [8.0], {0: 9.0})
    run.end("unseen", "stopped", 1)
    data = leaderboard(tmp_path)
    assert data["sweeps"] == []
    assert {each["name"]: each["eval_loss"] for each in data["adapters"]} == {
        "last": 2.0,
        "best": 1.5,
        "failed": None,
        "stopped": 1.75,
        "unseen": None,
    }
    assert rows_of(data, "label") == ["best", "stopped", "last", "unseen", "failed"]
    assert (data["rows"][4]["states"], data["rows"][4]["train_loss"]) == ({"failed": 1}, None)
    failed = data["adapters"][2]
    assert (failed["reason"], failed["train_loss"], failed["num_trainable"]) == ("the loss is not finite", 4.5, None)


def test_without_held_out_records_the_mean_of_the_last_training_losses_decides(tmp_path: Path) -> None:
    plain = {"method": "lora", "data": "x.jsonl"}
    run = Run(tmp_path, {**plain, "name": "a"}, {**plain, "name": "b", "r": 4}, {**QA, "name": "c"})
    a, b = [1.0] * 10 + [4.0] * 9 + [2.0], [9.0] * 10 + [3.5] * 9 + [float("nan")]
    run.train("a", a)
    run.train("b", b)
    run.train("c", [50.0], {1: 40.0})
    for name in "abc":
        run.end(name, "done", 20)
    data = leaderboard(tmp_path)
    assert rows_of(data, "label") == ["c", "a", "b"]
    means = [spread["mean"] for spread in rows_of(data, "train_loss")]
    assert means == pytest.approx([50.0, (9 * 4.0 + 2.0) / 10, (9.0 + 9 * 3.5) / 10])


def test_rows_of_what_has_not_trained_at_all_come_last(tmp_path: Path) -> None:
    run = Run(tmp_path, {**QA, "name": "waits"}, {**QA, "name": "runs", "r": 4})
    run.train("runs", [5.0])
    data = leaderboard(tmp_path)
    assert rows_of(data, "label", "states") == [("runs", {"running": 1}), ("waits", {"queued": 1})]
    assert data["rows"][1]["eval_loss"] is data["rows"][1]["train_loss"] is None


def test_only_the_seed_may_differ_in_a_row_whatever_the_names(tmp_path: Path) -> None:
    entries = [{**QA, "name": "x", "seed": 1}, {**QA, "name": "y", "seed": 2}, {**QA, "name": "z", "seed": 2, "r": 4}]
    run = Run(tmp_path, *entries)
    for name, loss in (("x", 1.0), ("y", 2.0), ("z", 1.25)):
        run.train(name, [1.0], {1: loss})
        run.end(name, "done", 1)
    assert rows_of(leaderboard(tmp_path), "label", "adapters") == [("z", ["z"]), ("x, y", ["x", "y"])]


def test_the_page_and_the_json_of_a_halved_sweep(tmp_path: Path) -> None:
    sweep = {"halve_every": 2, "keep": 0.4}
    entry = {**QA, "method": ["lora", "mixlora"], "num_experts": [2, 4], "seed": [0, 1], "sweep": sweep}
    run = Run(tmp_path, entry)
    for index, job in enumerate(run.config.adapters):
        run.train(job.name, [3.0, 2.0], {2: 1.0 + index / 10})
        failed = job.name == "qa-mixlora-num_experts4-seed1"
        state = "failed" if failed else "done" if index < 3 else "halved"
        run.end(job.name, state, num_saved=None if failed else 1234)
    run.end("submitted", "refused")
    write_leaderboard(tmp_path)
    data = json.loads((tmp_path / "leaderboard.json").read_text())
    assert data == leaderboard(tmp_path)
    assert [each["name"] for each in data["adapters"]] == [job.name for job in run.config.adapters]
    assert data["sweeps"][0]["keys"] == ["method", "num_experts"]
    page = (tmp_path / "leaderboard.md").read_text()
    assert "Every 2 steps the best 40% went on, by eval_loss." in page
    table = page.split("## Sweep qa")[1].split("## All adapters")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table if line.startswith("|")]
    assert cells[0] == (
        ["", "method", "num_experts", "seeds", "held-out loss", "training loss", "trainable", "tokens", "time", "state"]
    )
    assert cells[2:] == [
        ["1", "lora", "–", "2", "1.0500 ± 0.0707", "2.5000 ± 0.0000", "1,234", "60", "0:01", "done"],
        ["2", "mixlora", "2", "2", "1.2500 ± 0.0707", "2.5000 ± 0.0000", "1,234", "60", "0:01", "1 done, 1 halved"],
        ["3", "mixlora", "4", "2", "1.4000 (1 of 2)", "2.5000 (1 of 2)", "1,234", "60", "0:01", "1 halved, 1 failed"],
    ]
    assert "| qa-mixlora-num_experts4 " in page.split("## All adapters")[1]


def test_a_pipe_in_a_setting_does_not_break_the_table(tmp_path: Path) -> None:
    Run(tmp_path, {**QA, "data": ["a|b.jsonl", "c.jsonl"], "max_steps": [None, 3]})
    write_leaderboard(tmp_path)
    page = (tmp_path / "leaderboard.md").read_text()
    assert "| a\\|b.jsonl | null " in page
    assert {line.replace("\\|", "").count("|") for line in page.splitlines() if line.startswith("|")} == {11, 10}
