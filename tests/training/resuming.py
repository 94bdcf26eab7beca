"""What the tests of resumed runs share: runs that die, and what must be equal afterwards."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny_run import new_trainer

from moe_peft import Trainer
from moe_peft.config import TrainConfig
from moe_peft.training.folder.metrics import read_metrics

CLOCK_FIELDS = ("seconds", "tokens_per_second")


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the trainer catches it for long, and no checkpoint comes of it."""


def kill_at_forward(trainer: Trainer, number: int) -> None:
    """Have the process die in the middle of the n-th forward from here, from 1."""
    at_forward(trainer, number, _die)


def _die() -> None:
    raise Killed


def at_forward(trainer: Trainer, number: int, action: Callable[[], object]) -> None:
    """Have ``action`` done in the middle of the n-th forward, from 1."""
    forward, calls = trainer.model.forward, iter(range(1, 10**6))

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            action()
        return forward(*args, **kwargs)

    trainer.model.forward = stand_in  # type: ignore[method-assign]


def run_and_die(config: TrainConfig, number: int) -> bool:
    """Run, or go on with a run, until its n-th forward; False when it came to its end before."""
    trainer = new_trainer(config)
    if hasattr(trainer, "model"):
        kill_at_forward(trainer, number)
    try:
        trainer.train()
    except Killed:
        return True
    return False


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """All rows but for what a clock says."""
    rows = read_metrics(folder / "metrics.jsonl")
    return [{key: row[key] for key in row if key not in CLOCK_FIELDS} for row in rows]


def adapters_of(folder: Path) -> dict[str, bytes]:
    """Every file of the saved adapters."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted((folder / "adapters").rglob("*"))
        if path.is_file()
    }


def assert_same_run(found: Path, expected: Path) -> None:
    """Two run folders must hold the same rows and the same adapters, to the bit."""
    ours, theirs = rows_of(found), rows_of(expected)
    for mine, other in zip(ours, theirs, strict=False):
        assert mine == other, json.dumps([mine, other])
    assert len(ours) == len(theirs)
    assert adapters_of(found) == adapters_of(expected)
