"""A sweep with successive halving as a run: who waits, who is dropped, and that a kill changes nothing of it."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from resuming import assert_same_run, rows_of, run_and_die
from tiny_run import adapter_entry, new_trainer, run_config, train

from moe_peft.config import TrainConfig

pytestmark = pytest.mark.usefixtures("no_pictures")


def sweep_of(base: Path, data: str, held_out: str, output_dir: Path, **changes: Any) -> TrainConfig:
    """Four members, of which two are kept at step 2 and one at step 4, beside an adapter of its own."""
    entry = adapter_entry(
        "s", data, lr=[1e-5, 1e-2, 1e-4, 1e-3], max_steps=6, eval_data=held_out, sweep={"halve_every": 2}
    )
    alone = adapter_entry("alone", data, max_steps=5)
    return run_config(base, output_dir, entry, alone, max_concurrent_adapters=2, save_steps=3, **changes)


def states_of(folder: Path) -> dict[str, list[str]]:
    states: dict[str, list[str]] = {}
    for row in rows_of(folder):
        if row["event"] == "job":
            states.setdefault(row["adapter"], []).append(row["state"])
    return states


def test_the_worse_half_is_dropped_at_every_rung(base: Path, data: str, held_out: str, tmp_path: Path) -> None:
    config = sweep_of(base, data, held_out, tmp_path / "run")
    names = [job.name for job in config.adapters]
    trainer = new_trainer(config)
    result = trainer.train()
    losses = {
        (row["adapter"], row["step"]): row["eval_loss"] for row in rows_of(tmp_path / "run") if row["event"] == "eval"
    }
    first = sorted(names[:4], key=lambda name: losses[name, 2])
    second = sorted(first[:2], key=lambda name: losses[name, 4])
    ends = {adapter.name: (adapter.state, adapter.num_steps) for adapter in result.adapters}
    assert ends == {
        second[0]: ("done", 6),
        second[1]: ("halved", 4),
        first[2]: ("halved", 2),
        first[3]: ("halved", 2),
        "alone": ("done", 5),
    }
    assert all(adapter.is_finished and adapter.saved_to is not None for adapter in result.adapters)
    states = states_of(tmp_path / "run")
    assert states["alone"] == ["queued", "running", "done"]
    assert states[names[0]][:3] == ["queued", "running", "waiting"], "it frees its place while it waits"
    running: set[str] = set()
    for row in rows_of(tmp_path / "run"):
        if row["event"] == "job":
            running = running | {row["adapter"]} if row["state"] == "running" else running - {row["adapter"]}
            assert len(running) <= 2
    assert (tmp_path / "run" / "leaderboard.md").is_file()


def test_a_member_that_waited_learns_what_it_would_have_without(
    base: Path, data: str, held_out: str, tmp_path: Path
) -> None:
    config = sweep_of(base, data, held_out, tmp_path / "run")
    train(config)
    best = next(
        name for name, states in states_of(tmp_path / "run").items() if states[-1] == "done" and name != "alone"
    )
    job = next(job for job in config.adapters if job.name == best).to_dict()
    alone = run_config(base, tmp_path / "alone", {**job, "sweep": None})
    train(alone)
    expected = [row["loss"] for row in rows_of(tmp_path / "alone") if row["event"] == "step"]
    found = [row["loss"] for row in rows_of(tmp_path / "run") if row["event"] == "step" and row["adapter"] == best]
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_killed_sweep_goes_on(base: Path, data: str, held_out: str, tmp_path: Path) -> None:
    train(sweep_of(base, data, held_out, tmp_path / "undisturbed"))
    for number in (4, 7, 10, 13, 16):
        assert run_and_die(sweep_of(base, data, held_out, tmp_path / "run"), number)
        train(sweep_of(base, data, held_out, tmp_path / "run"))
        assert_same_run(tmp_path / "run", tmp_path / "undisturbed")
        shutil.rmtree(tmp_path / "run")
