"""The table of a run's jobs, and the same for programs."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from run_maker import eval_row, make_run, put_job, put_stops, step_row

from moe_peft.training.folder.inbox import Inbox
from moe_peft.training.folder.journal import Journal
from moe_peft.training.folder.metrics import JobMetrics, MetricsWriter
from moe_peft.training.folder.run_lock import RunLock
from moe_peft.training.folder.run_status import read_run
from moe_peft.training.folder.status_table import headline, status_dict, status_report


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """One that shows a job of every kind."""
    folder = make_run(
        tmp_path / "run",
        *(step_row("qa", number, loss=2 / number) for number in range(1, 4)),
        eval_row("qa", 3, 0.75),
        JobMetrics(adapter="mix", state="running"),
        step_row("mix", 1, num_steps=1200),
        JobMetrics(adapter="mix", state="failed", step=1, reason="loss nan [3 times]", saved_to="adapters/mix"),
        JobMetrics(adapter="[bold]odd", state="refused", reason="the request cannot be read"),
    )
    put_stops(folder, "qa")
    Journal(folder / "journal.jsonl").take_in(Inbox(folder), 3)
    put_job(folder, "late")
    return folder


def shown(run: Path) -> list[list[str]]:
    """The cells of every line."""
    console = Console(file=io.StringIO(), width=150)
    console.print(status_report(read_run(run)))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines() if line.strip()]


def test_the_table(run: Path) -> None:
    lines = shown(run)
    assert lines[1] == ["adapter", "method", "state", "step", "loss", "held-out loss", "tokens/s"]
    rows = {line[0]: line[1:] for line in lines[3:]}
    assert rows == {
        "qa": ["lora", "running", "3/40", "0.6667", "0.7500", "60", "is asked to stop"],
        "mix": ["mixlora", "failed", "1/1,200", "2.0000", "–", "–", "loss nan [3 times]; saved to adapters/mix"],
        "[bold]odd": ["–", "refused", "0", "–", "–", "–", "the request cannot be read"],
        "late": ["lora", "queued", "0/3", "–", "–", "–", "waits to be taken in"],
    }


def test_columns_that_say_nothing_are_left_out(tmp_path: Path) -> None:
    plain = make_run(tmp_path / "plain", step_row("qa", 1))
    assert shown(plain)[1] == ["adapter", "method", "state", "step", "loss", "tokens/s"]
    with MetricsWriter(plain / "metrics.jsonl") as metrics:
        metrics.take(step_row("qa", 2, skipped_steps=1, skipped="loss inf"))
    assert shown(plain)[1] == ["adapter", "method", "state", "step", "loss", "skipped", "tokens/s"]


def test_the_headline(run: Path) -> None:
    counts = f"{run}: 1 queued, 1 running, 1 failed, 1 refused; "
    to_resume = f"no process trains it; to resume: python -m moe_peft.train {run}/config.yaml"
    assert headline(read_run(run)) == counts + to_resume
    with RunLock(run):
        assert headline(read_run(run)).startswith(counts + "trained by process ")
    inbox = Inbox(run)
    inbox.remove(inbox.take()[0])
    inbox.close()
    assert headline(read_run(run)).endswith("; complete")


def test_the_same_for_programs(run: Path) -> None:
    told = json.loads(json.dumps(status_dict(read_run(run)), allow_nan=False))
    assert (told["folder"], told["trained_by"], told["is_complete"]) == (str(run), None, False)
    jobs = {job["name"]: job for job in told["jobs"]}
    assert list(jobs) == ["qa", "mix", "[bold]odd", "late"]
    assert jobs["qa"] == {
        "name": "qa",
        "method": "lora",
        "state": "running",
        "step": 3,
        "num_steps": 40,
        "loss": 2 / 3,
        "eval_loss": 0.75,
        "best_eval_loss": 0.75,
        "tokens_per_second": 60.0,
        "skipped_steps": 0,
        "reason": None,
        "saved_to": None,
        "asked": "stop",
    }
    assert (jobs["mix"]["saved_to"], jobs["mix"]["reason"]) == (str(run / "adapters" / "mix"), "loss nan [3 times]")
    assert (jobs["late"]["asked"], jobs["[bold]odd"]["method"]) == ("submit", None)
