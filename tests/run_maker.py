"""Folders of runs as the files of a real one would be, at any moment that a test needs."""

from pathlib import Path
from typing import Any

from tiny_run import adapter_entry, run_config

from moe_peft.config import AdapterJob
from moe_peft.training.folder.inbox import Inbox, Request
from moe_peft.training.folder.metrics import EvalMetrics, MetricsWriter, Row, StepMetrics


def make_run(folder: Path, *rows: Row, **changes: Any) -> Path:
    """The folder of a run that has come to these rows.

    Its adapters are ``qa``, LoRA with a step limit, and ``mix``, MixLoRA without.
    """
    entries = [
        adapter_entry("qa", "/data/train.jsonl", max_steps=40),
        adapter_entry("mix", "/data/train.jsonl", method="mixlora", max_steps=None),
    ]
    config = run_config(Path("/models/tiny"), folder, *entries, **changes)
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(config.to_yaml())
    with MetricsWriter(folder / "metrics.jsonl") as metrics:
        for row in rows:
            metrics.take(row)
    return folder


def step_row(adapter: str, number: int, **changes: Any) -> StepMetrics:
    """An optimizer step of 40."""
    fields = {
        "adapter": adapter,
        "step": number,
        "num_steps": 40,
        "epoch": 0.1,
        "loss": 2.0,
        "aux_loss": 0.0,
        "lr": 0.1,
        "grad_norm": 1.0,
        "num_supervised_tokens": 30,
        "num_tokens": 50,
        "seconds": 0.5,
        "tokens_per_second": 60.0,
    }
    return StepMetrics(**{**fields, **changes})


def eval_row(adapter: str, number: int, loss: float) -> EvalMetrics:
    """An evaluation."""
    return EvalMetrics(adapter=adapter, step=number, eval_loss=loss, num_supervised_tokens=9)


def new_job(name: str, **changes: Any) -> AdapterJob:
    """A LoRA job whose data is nowhere."""
    return AdapterJob.from_dict(adapter_entry(name, "/data/train.jsonl", **changes))


def put_job(run: Path, name: str) -> Request:
    """Submit a job, unchecked."""
    inbox = Inbox(run)
    with inbox.lock():
        return inbox.put_job(new_job(name))


def put_stops(run: Path, *names: str) -> list[Request]:
    """Ask for stops, unchecked."""
    inbox = Inbox(run)
    with inbox.lock():
        return [inbox.put_stop(name) for name in names]
