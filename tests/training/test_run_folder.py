"""The folder of a run: where it is made, where it is refused, what is saved in it."""

import dataclasses
from pathlib import Path

import pytest
from tiny_run import adapter_entry, new_trainer, run_config

from moe_peft.config import TrainConfig
from moe_peft.training.folder.run_folder import RunFolder, check_output_dir


@pytest.fixture
def config(base: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """One without a folder of its own, in an empty current folder."""
    monkeypatch.chdir(tmp_path)
    return dataclasses.replace(run_config(base, tmp_path, adapter_entry("qa", data)), output_dir=None)


def test_without_a_name_the_first_free_number_is_taken(config: TrainConfig, tmp_path: Path) -> None:
    assert [str(RunFolder(config).path) for _ in range(3)] == ["runs/run-001", "runs/run-002", "runs/run-003"]
    (tmp_path / "runs" / "run-004").write_text("even a file takes a name")
    assert str(RunFolder(config).path) == "runs/run-005"
    check_output_dir(None)


def test_the_config_saved_in_it_reads_back_with_its_place(config: TrainConfig, tmp_path: Path) -> None:
    folder = RunFolder(dataclasses.replace(config, output_dir="deep/down/here"))
    saved = TrainConfig.from_file(tmp_path / "deep" / "down" / "here" / "config.yaml")
    assert saved == dataclasses.replace(config, output_dir="deep/down/here")
    assert folder.metrics == Path("deep/down/here/metrics.jsonl")
    assert TrainConfig.from_file(RunFolder(config).path / "config.yaml").output_dir == "runs/run-001"


def test_an_empty_folder_is_used_and_an_occupied_one_refused(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    RunFolder(dataclasses.replace(config, output_dir="mine"))
    for refuse in (check_output_dir, lambda name: RunFolder(dataclasses.replace(config, output_dir=name))):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ValueError, match=r"output_dir='mine' must be new or empty"):
            refuse("mine")
        with pytest.raises(ValueError, match=r"'mine/config.yaml/x' must be a folder, but mine/config.yaml is a file"):
            refuse("mine/config.yaml/x")
        with pytest.raises(ValueError, match=r"must be a folder, but mine/config.yaml is a file"):
            refuse("mine/config.yaml")
        assert sorted(tmp_path.rglob("*")) == before


def test_a_file_in_the_place_of_the_default_parent(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(ValueError, match="runs is a file"):
        check_output_dir(None)


def test_the_home_folder_is_understood(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = RunFolder(dataclasses.replace(config, output_dir="~/runs/a"))
    assert folder.path == tmp_path / "home" / "runs" / "a"
    assert TrainConfig.from_file(folder.path / "config.yaml").output_dir == str(folder.path)
    with pytest.raises(ValueError, match="must be new or empty"):
        check_output_dir("~/runs/a")


def test_saving_again_replaces(config: TrainConfig) -> None:
    trainer = new_trainer(config)
    folder = RunFolder(config)
    run = trainer.runs["qa"]
    assert folder.save(trainer.model, "qa") == folder.adapter("qa") == Path("runs/run-001/adapters/qa")
    first = (folder.adapter("qa") / "adapter_model.safetensors").read_bytes()
    for weight in run.parameters:
        weight.data.add_(1)
    folder.save(trainer.model, "qa")
    assert (folder.adapter("qa") / "adapter_model.safetensors").read_bytes() != first


def test_one_process_at_a_time(config: TrainConfig) -> None:
    mine = dataclasses.replace(config, output_dir="mine")
    with RunFolder(mine), pytest.raises(ValueError, match="the run folder mine is being trained by process"):
        RunFolder(mine, is_resumed=True)
    RunFolder(mine, is_resumed=True).close()


def test_what_a_killed_process_left_half_written_is_removed(config: TrainConfig, tmp_path: Path) -> None:
    mine = dataclasses.replace(config, output_dir="mine")
    RunFolder(mine).close()
    before = sorted(tmp_path.rglob("*"))
    (tmp_path / "mine" / ".config.yaml.0123.partial").write_text("half")
    (tmp_path / "mine" / "adapters").mkdir()
    (tmp_path / "mine" / "adapters" / ".qa.0123.partial").mkdir()
    RunFolder(mine, is_resumed=True).close()
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "mine" / "adapters"])


def test_a_folder_that_a_run_left_at_its_very_beginning_is_taken(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "run.lock").write_text("")
    (tmp_path / "mine" / ".config.yaml.0123.partial").write_text("half")
    RunFolder(dataclasses.replace(config, output_dir="mine")).close()
    assert (tmp_path / "mine" / "config.yaml").is_file()
