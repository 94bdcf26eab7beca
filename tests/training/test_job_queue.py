"""Who trains when: places, order, late jobs, and jobs that do not fit into memory."""

from pathlib import Path

import pytest
import torch
from resuming import rows_of
from tiny_run import adapter_entry, new_trainer, run_config, train

from moe_peft import Trainer
from moe_peft.training.adapter_run import AdapterRun
from moe_peft.training.errors import UnfinishedError

pytestmark = pytest.mark.usefixtures("no_pictures")


def running_over_time(folder: Path) -> list[tuple[int, tuple[str, ...]]]:
    """The fused step and who runs from then on, at every change."""
    running: tuple[str, ...] = ()
    changes = []
    for row in rows_of(folder):
        if row["event"] == "job":
            if row["state"] == "running":
                running += (row["adapter"],)
            elif row["adapter"] in running:
                running = tuple(name for name in running if name != row["adapter"])
            changes.append((row["fused_step"], running))
    return changes


def test_a_free_place_is_filled_before_the_next_step(base: Path, data: str, tmp_path: Path) -> None:
    entries = [adapter_entry(name, data, max_steps=steps) for name, steps in zip("abcde", (2, 5, 1, 4, 2), strict=True)]
    config = run_config(base, tmp_path / "run", *entries, max_concurrent_adapters=2)
    trainer = new_trainer(config)
    assert list(trainer.runs) == ["a", "b"], "the others take no memory yet"
    result = trainer.train()
    assert [adapter.status for adapter in result.adapters] == ["done"] * 5
    at = {running: step for step, running in running_over_time(tmp_path / "run")}
    assert at["a", "b"] == 0
    assert at["b", "c"] == 2
    assert at["b", "d"] == 3
    assert at["d", "e"] == 5
    assert trainer.runs == {}
    assert trainer.model.adapter_names == [], "who has ended takes none any more"
    steps = [row for row in rows_of(tmp_path / "run") if row["event"] == "step"]
    assert max(row["fused_step"] for row in steps) == 7, "two at a time"


@pytest.mark.parametrize("max_concurrent", [1, 2, None])
def test_how_many_run_at_once_changes_no_adapter(
    max_concurrent: int | None, base: Path, data: str, tmp_path: Path
) -> None:
    entries = [
        adapter_entry("qa", data, lora_dropout=0.1, micro_batch_size=3),
        adapter_entry("mix", data, method="mixlora", num_experts=3, max_steps=5),
        adapter_entry("late", data, max_steps=2),
    ]
    train(run_config(base, tmp_path / "run", *entries, max_concurrent_adapters=max_concurrent))
    train(run_config(base, tmp_path / "alone", entries[2]))
    numbers = {
        name: [
            {key: row[key] for key in ("step", "loss", "grad_norm", "num_tokens", "lr")}
            for row in rows_of(tmp_path / name)
            if row["event"] == "step" and row["adapter"] == "late"
        ]
        for name in ("run", "alone")
    }
    for row, expected in zip(numbers["run"], numbers["alone"], strict=True):
        assert row == pytest.approx(expected, rel=1e-5)


def fits(trainer_limit: int) -> object:
    """Stands for a GPU that has room for so many adapters."""
    build = AdapterRun.__post_init__

    def post_init(run: AdapterRun) -> None:
        if len(run.model.adapter_names) > trainer_limit:
            raise torch.OutOfMemoryError("no room")
        build(run)

    return post_init


def test_an_adapter_that_finds_no_memory_waits_for_a_place(
    base: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AdapterRun, "__post_init__", fits(2))
    entries = [adapter_entry(name, data) for name in "abcd"]
    trainer = new_trainer(run_config(base, tmp_path / "run", *entries))
    assert list(trainer.runs) == trainer.model.adapter_names == ["a", "b"]
    assert "c: out of memory, so it waits until another adapter has ended" in trainer.console.file.getvalue()
    assert [adapter.status for adapter in trainer.train().adapters] == ["done"] * 4
    assert max(len(running) for _, running in running_over_time(tmp_path / "run")) == 2


def test_an_adapter_that_has_no_room_even_alone_fails(
    base: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = AdapterRun.__post_init__

    def post_init(run: AdapterRun) -> None:
        if run.job.name == "large":
            raise torch.OutOfMemoryError("no room")
        build(run)

    monkeypatch.setattr(AdapterRun, "__post_init__", post_init)
    entries = [adapter_entry("large", data), adapter_entry("small", data)]
    trainer: Trainer = new_trainer(run_config(base, tmp_path / "run", *entries, max_concurrent_adapters=1))
    with pytest.raises(
        UnfinishedError, match=r"^adapter 'large': failed: its weights and optimizer do not fit"
    ) as caught:
        trainer.train()
    assert "small" not in str(caught.value)
    assert not (tmp_path / "run" / "adapters" / "large").exists()
    rows = [row for row in rows_of(tmp_path / "run") if row["event"] == "job" and row["adapter"] == "large"]
    assert [row["state"] for row in rows] == ["queued", "failed"]
