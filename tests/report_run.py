"""Folders of runs that never ran: a config and the rows a trainer would have written, for the tests of the report."""

import math
from pathlib import Path
from typing import Any

from moe_peft.config import TrainConfig
from moe_peft.training.folder.metrics import EvalMetrics, ExpertMetrics, JobMetrics, MetricsWriter, Row, StepMetrics


def write_config(folder: Path, names: list[str], **changes: Any) -> None:
    """The config of a run; a name with ``moe`` in it is a mixture's."""
    folder.mkdir(parents=True)
    entries = [
        {
            "name": name,
            "data": f"{name}.jsonl",
            "lr": 1e-4 * (1 + place),
            "max_steps": 100,
            **({"method": "mixlora", "num_experts": 4, "top_k": 2} if "moe" in name else {"method": "lora"}),
        }
        for place, name in enumerate(names)
    ]
    config = TrainConfig.from_dict(
        {"base_model": "base & more", "output_dir": str(folder), "device": "cpu", "adapters": entries, **changes}
    )
    (folder / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")


def write_rows(folder: Path, rows: list[Row]) -> None:
    """The rows of a run."""
    with MetricsWriter(folder / "metrics.jsonl") as writer:
        for row in rows:
            writer.take(row)


def step_row(adapter: str, step: int, **changes: Any) -> StepMetrics:
    """An optimizer step of 100, whose loss falls from 3."""
    fields = {
        "adapter": adapter,
        "step": step,
        "num_steps": 100,
        "epoch": step / 10,
        "loss": 3.0 * math.exp(-step / 40) + 0.05 * math.sin(7.0 * step),
        "aux_loss": 0.02 if "moe" in adapter else 0.0,
        "lr": 1e-4 * (1 - step / 200),
        "grad_norm": 1.0 + 0.1 * math.cos(step),
        "num_supervised_tokens": 30,
        "num_tokens": 90,
        "seconds": 0.5,
        "tokens_per_second": 60.0 + step % 7,
        "fused_step": step,
    }
    return StepMetrics(**{**fields, **changes})


def adapter_rows(name: str, num_steps: int = 100, state: str | None = "done", **last: Any) -> list[Row]:
    """A whole adapter: evaluations every 25 steps, experts every 10, and its end in this state; None: no end yet."""
    rows: list[Row] = [JobMetrics(adapter=name, state="queued"), JobMetrics(adapter=name, state="running")]
    for step in range(num_steps + 1):
        if step:
            rows.append(step_row(name, step))
        if step % 25 == 0:
            loss = 3.1 * math.exp(-step / 50)
            rows.append(EvalMetrics(adapter=name, step=step, eval_loss=loss, num_supervised_tokens=50, fused_step=step))
        if "moe" in name and step and step % 10 == 0:
            # Layer 1 sends nearly all to expert 2, and expert 0 of layer 2 gets none.
            counts = ((50, 50, 50, 50), (5, 5, 99, 91), (0, 60, 70, 70))
            rows.append(ExpertMetrics(adapter=name, step=step, counts=counts, fused_step=step))
    if state is not None:
        rows.append(JobMetrics(adapter=name, state=state, step=num_steps, fused_step=num_steps, **last))
    return rows
