"""A run that dies at any moment and goes on ends as one that was never disturbed; what does not fit is refused."""

import dataclasses
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from resuming import Killed, adapters_of, assert_same_run, at_forward, kill_at_forward, rows_of, run_and_die
from tiny_run import adapter_entry, new_trainer, run_config, train

from moe_peft.config import TrainConfig
from moe_peft.ops import compiled_library
from moe_peft.training.folder.inbox import Inbox

pytestmark = pytest.mark.usefixtures("no_pictures")


def entries_of(data: str, held_out: str) -> list[dict[str, Any]]:
    """Adapters of different kinds, lengths and paces, with every random draw there is."""
    return [
        adapter_entry(
            "mix",
            data,
            method="mixlora",
            num_experts=3,
            lora_dropout=0.2,
            router_jitter_noise=0.1,
            batch_size=5,
            micro_batch_size=2,
            max_steps=4,
        ),
        adapter_entry("qa", data, lora_dropout=0.1, max_steps=5, eval_data=held_out, eval_steps=2, weight_decay=0.1),
        adapter_entry("sgd", data, optimizer="sgd", momentum=0.9, batch_size=3, micro_batch_size=1, max_steps=3),
        adapter_entry("late", data, max_steps=2, eval_data=held_out, lr_scheduler="linear", warmup_steps=1),
    ]


@pytest.fixture
def new_config(base: Path, data: str, held_out: str, tmp_path: Path) -> Callable[..., TrainConfig]:
    def config(name: str, **changes: Any) -> TrainConfig:
        fields = {"max_concurrent_adapters": 2, "save_steps": 2, "max_batch_tokens": 150}
        return run_config(base, tmp_path / name, *entries_of(data, held_out), **{**fields, **changes})

    return config


def count_forwards(config: TrainConfig) -> int:
    trainer, calls = new_trainer(config), []
    trainer.model.register_forward_hook(lambda *_: calls.append(1))
    trainer.train()
    return len(calls)


@pytest.mark.parametrize("save_steps", [1, 2, None])
def test_killed_at_every_other_forward(
    save_steps: int | None, new_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    undisturbed = new_config("undisturbed", save_steps=save_steps)
    num_forwards = count_forwards(undisturbed)
    assert num_forwards > 15
    for number in range(1, num_forwards + 1, 2 if save_steps == 2 else 7):
        config = new_config("run", save_steps=save_steps)
        assert run_and_die(config, number)
        assert not run_and_die(config, 10**6)
        assert_same_run(tmp_path / "run", tmp_path / "undisturbed")
        shutil.rmtree(tmp_path / "run")


def test_killed_again_and_again(new_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    train(new_config("undisturbed"))
    config = new_config("run")
    for number in (1, 3, 6, 4, 8):
        assert run_and_die(config, number)
    assert not run_and_die(config, 10**6)
    assert_same_run(tmp_path / "run", tmp_path / "undisturbed")


@pytest.mark.parametrize(
    ("number", "ending", "code"), [(signal.SIGINT, KeyboardInterrupt, None), (signal.SIGTERM, SystemExit, 143)]
)
def test_a_signal_writes_a_checkpoint_from_which_the_run_goes_on(
    number: signal.Signals,
    ending: type[BaseException],
    code: int | None,
    new_config: Callable[..., TrainConfig],
    tmp_path: Path,
) -> None:
    train(new_config("undisturbed", save_steps=None))
    config = new_config("run", save_steps=None)
    for forward in (3, 4, 2):
        trainer = new_trainer(config)
        before = trainer.fused_run.fused_step
        at_forward(trainer, forward, lambda: signal.raise_signal(number))
        with pytest.raises(ending) as caught:
            trainer.train()
        assert getattr(caught.value, "code", None) == code
        done = trainer.fused_run.fused_step
        assert done > before
        assert f"python -m moe_peft.train {tmp_path / 'run' / 'config.yaml'}" in trainer.console.file.getvalue()
        assert (tmp_path / "run" / "checkpoints" / f"step-{done:08d}" / "manifest.json").is_file()
    # The saved config continues the run as well as the user's own.
    train(TrainConfig.from_file(tmp_path / "run" / "config.yaml"))
    assert_same_run(tmp_path / "run", tmp_path / "undisturbed")


def test_early_stopping_and_bad_steps_are_resumed(base: Path, data: str, held_out: str, tmp_path: Path) -> None:
    def config(name: str) -> TrainConfig:
        entries = [
            # It learns, then a rate beyond reason ruins it.
            adapter_entry("stops", data, lr=2.0, max_steps=20, eval_data=held_out, eval_steps=1, patience=3),
            adapter_entry("fails", data, lr=1e30, max_steps=9, max_bad_steps=4),
            adapter_entry("next", data, max_steps=3),
        ]
        return run_config(base, tmp_path / name, *entries, max_concurrent_adapters=2, save_steps=1)

    with pytest.raises(RuntimeError, match="adapter 'fails': failed: loss=nan"):
        train(config("undisturbed"))
    rows = rows_of(tmp_path / "undisturbed")
    assert {row["state"] for row in rows if row["event"] == "job"} == {
        "queued", "running", "done", "early-stopped", "failed"
    }  # fmt: skip
    for number in (3, 5, 8, 12):
        assert run_and_die(config("run"), number)
        with pytest.raises(RuntimeError, match="adapter 'fails': failed: loss=nan"):
            train(config("run"))
        assert_same_run(tmp_path / "run", tmp_path / "undisturbed")
        shutil.rmtree(tmp_path / "run")


def test_a_float16_run_keeps_its_loss_scales(
    new_config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_peft.training.loss_scale.GROWTH_INTERVAL", 2)
    for name in ("undisturbed", "run"):
        trainer = new_trainer(new_config(name, dtype="float16"))
        if name == "run":
            kill_at_forward(trainer, 6)
            with pytest.raises(Killed):
                trainer.train()
            train(trainer.config)
        else:
            trainer.train()
    scales = {row["loss_scale"] for row in rows_of(tmp_path / "run") if row["event"] == "step"}
    assert {65536.0, 131072.0} <= scales
    assert_same_run(tmp_path / "run", tmp_path / "undisturbed")


def test_submitted_and_stopped_jobs_are_replayed(
    new_config: Callable[..., TrainConfig], base: Path, data: str, held_out: str, tmp_path: Path
) -> None:
    more = run_config(
        base, tmp_path / "x", adapter_entry("more", data, max_steps=3), adapter_entry("bad", "no/such.jsonl")
    )

    def ask(folder: Path) -> None:
        inbox = Inbox(folder)
        with inbox.lock():
            for job in more.adapters:
                inbox.put_job(job)
            inbox.put_stop("sgd")
            inbox.put_stop("nobody")

    reason = "adapter 'sgd': stopped: by request; adapter 'bad': refused: there is no data file"
    undisturbed = new_trainer(new_config("undisturbed"))
    at_forward(undisturbed, 5, lambda: ask(tmp_path / "undisturbed"))
    with pytest.raises(RuntimeError, match=reason):
        undisturbed.train()
    states = {row["adapter"]: row["state"] for row in rows_of(tmp_path / "undisturbed") if row["event"] == "job"}
    assert states == {
        "mix": "done", "qa": "done", "late": "done", "sgd": "stopped", "more": "done", "bad": "refused"
    }  # fmt: skip
    for kill in (6, 9, 13):
        trainer = new_trainer(new_config("run"))
        at_forward(trainer, 5, lambda: ask(tmp_path / "run"))
        kill_at_forward(trainer, kill)
        with pytest.raises(Killed):
            trainer.train()
        with pytest.raises(RuntimeError, match=reason):
            train(new_config("run"))
        assert_same_run(tmp_path / "run", tmp_path / "undisturbed")
        shutil.rmtree(tmp_path / "run")


def damage(folder: Path, how: str) -> None:
    """Spoil a checkpoint as a crash, a bad disk or a hand may."""
    state, weights = folder / "state.json", folder / "qa.safetensors"
    if how == "one bit":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    elif how == "file gone":
        weights.unlink()
    elif how == "no manifest":
        (folder / "manifest.json").unlink()
    else:
        state.write_text(state.read_text().replace('"running"', '"runnign"'))


@pytest.mark.parametrize("how", ["one bit", "file gone", "no manifest", "state"])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(
    how: str, new_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    train(new_config("undisturbed"))
    assert run_and_die(new_config("run"), 9)
    checkpoints = tmp_path / "run" / "checkpoints"
    names = sorted(path.name for path in checkpoints.iterdir())
    assert len(names) == 2, "keep_checkpoints"
    damage(checkpoints / names[-1], how)
    trainer = new_trainer(new_config("run"))
    text = trainer.console.file.getvalue()
    assert f"Warning: the checkpoint {checkpoints / names[-1]} is damaged (" in text
    assert trainer.fused_run.fused_step == int(names[0].removeprefix("step-"))
    trainer.train()
    assert_same_run(tmp_path / "run", tmp_path / "undisturbed")


def test_without_an_intact_checkpoint_the_run_begins_again(
    new_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    train(new_config("undisturbed"))
    assert run_and_die(new_config("run"), 9)
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        damage(path, "no manifest")
    trainer = new_trainer(new_config("run"))
    assert "is intact: the run begins again" in trainer.console.file.getvalue()
    trainer.train()
    assert_same_run(tmp_path / "run", tmp_path / "undisturbed")


@pytest.mark.parametrize("keep", [1, 3])
def test_only_so_many_checkpoints_are_kept(keep: int, new_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    train(new_config("run", keep_checkpoints=keep, save_steps=1))
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == keep


def test_a_complete_run_tells_its_end_again(new_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    result = train(new_config("run"))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    trainer = new_trainer(new_config("run"))
    again = trainer.train()
    assert again == result
    text = trainer.console.file.getvalue()
    assert "is complete: nothing is left to do" in text
    assert "Held-out loss" in text
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_the_run_of_another_config_is_refused(new_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    assert run_and_die(new_config("run"), 6)
    config = new_config("run")
    job = dataclasses.replace(config.adapters[1], lr=0.5)
    changed = dataclasses.replace(config, seed=3, adapters=(config.adapters[0], job, *config.adapters[2:]))
    with pytest.raises(ValueError) as caught:
        new_trainer(changed)
    message = str(caught.value)
    assert "the run of another config, which differs in seed=3 (the run has 0); " in message
    assert "; adapters.qa.lr=0.5 (the run has 0.01): " in message
    with pytest.raises(ValueError, match=r"differs in the adapters=\['mix'\] \(the run has \['mix', 'qa'"):
        new_trainer(dataclasses.replace(config, adapters=config.adapters[:1]))
    with pytest.raises(ValueError, match="--no-resume"):
        type(new_trainer(config))(config, resume=False)


def test_keys_that_change_no_result_may_differ(new_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    train(new_config("undisturbed"))
    assert run_and_die(new_config("run"), 9)
    changes = {"save_steps": 5, "keep_checkpoints": 1, "answer_examples": 1, "activation_checkpointing": "full"}
    train(new_config("run", dtype="float32", **changes))
    assert_same_run(tmp_path / "run", tmp_path / "undisturbed")


def test_another_machine_is_told_of(new_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_and_die(new_config("run"), 9)
    monkeypatch.setattr("torch.get_num_threads", lambda: 77)
    trainer = new_trainer(new_config("run"))
    trainer.train()
    text = trainer.console.file.getvalue()
    assert "Warning: the run goes on with threads 77 instead of " in text
    assert "its results may differ in their last bits" in text


def test_other_data_is_refused(base: Path, data: str, tmp_path: Path) -> None:
    own = tmp_path / "own.jsonl"
    shutil.copy(data, own)
    config = run_config(base, tmp_path / "run", adapter_entry("qa", str(own), max_steps=9), save_steps=1)
    assert run_and_die(config, 5)
    lines = own.read_text().splitlines()
    own.write_text("\n".join([json.dumps({**json.loads(lines[0]), "output": "other"}), *lines[1:]]))
    with pytest.raises(ValueError, match=r"adapter 'qa': its data, .* has changed since the run began"):
        new_trainer(config)


def test_metrics_that_were_cut_are_refused(new_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    assert run_and_die(new_config("run"), 9)
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"metrics.jsonl has 0 bytes, but its run's checkpoint knows of"):
        train(new_config("run"))


def test_a_disk_without_room_leaves_the_checkpoint_before(
    new_config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from moe_peft.training.folder import checkpoints

    train(new_config("undisturbed"))
    write, full = checkpoints.save_safetensors_atomically, []

    def no_room(*args: object) -> None:
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoints, "save_safetensors_atomically", no_room)
    trainer = new_trainer(new_config("run"))
    at_forward(trainer, 6, lambda: full.append(1))
    kill_at_forward(trainer, 11)
    folder = tmp_path / "run" / "checkpoints"
    with pytest.raises(Killed):
        trainer.train()
    text = trainer.console.file.getvalue()
    assert "Warning: no checkpoint could be written after fused step " in text
    assert "No space left on device" in text
    assert "the checkpoint before it stays" in text
    kept = sorted(path.name for path in folder.iterdir())
    full.clear()
    trainer = new_trainer(new_config("run"))
    assert trainer.fused_run.fused_step == int(kept[-1].removeprefix("step-"))
    trainer.train()
    assert_same_run(tmp_path / "run", tmp_path / "undisturbed")
    assert adapters_of(tmp_path / "run")


def test_other_code_for_the_cpu_is_told_of(
    new_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_and_die(new_config("run"), 9)
    problem = "no C++ compiler was found (g++, clang++)"
    monkeypatch.setattr("moe_peft.ops.compiled_library", lambda: SimpleNamespace(name="plain PyTorch", problem=problem))
    trainer = new_trainer(new_config("run"))
    trainer.train()
    text = " ".join(trainer.console.file.getvalue().split())
    assert f"Warning: {problem}, so the CPU runs plain PyTorch, which can take twice the time" in text
    if not torch.cuda.is_available() and compiled_library().functions is not None:
        assert "the run goes on with code 'plain PyTorch' instead of 'cpu-" in text
