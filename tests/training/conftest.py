"""What the tests of whole runs share: a tiny base model, data, and runs without pictures."""

from pathlib import Path

import pytest
from tiny_run import instructions, make_base_folder, write_jsonl

from moe_peft.training.folder.run_folder import RunFolder


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a base model."""
    return make_base_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of 18 training records."""
    return write_jsonl(tmp_path_factory.mktemp("data") / "train.jsonl", instructions(18))


@pytest.fixture(scope="session")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of 7 held-out records."""
    return write_jsonl(tmp_path_factory.mktemp("data") / "eval.jsonl", instructions(7, shift=100))


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs draw nothing: the pictures take longer than everything else."""
    monkeypatch.setattr(RunFolder, "draw", lambda self, runs: None)
