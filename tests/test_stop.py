"""``moe-peft stop``: what it says, what it refuses, and what it leaves in the run's folder."""

from pathlib import Path

import pytest
from refusal import assert_refused
from run_maker import make_run, step_row

from moe_peft.stop import main
from moe_peft.training.folder.inbox import Inbox
from moe_peft.training.folder.metrics import JobMetrics
from moe_peft.training.folder.run_lock import RunLock

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run in the current folder, of which ``mix`` is done."""
    monkeypatch.chdir(tmp_path)
    return make_run(Path("run"), step_row("qa", 1), JobMetrics(adapter="mix", state="done", step=9))


def test_help_teaches(capsys: Capture) -> None:
    assert main(["--help"]) == 0
    text, errors = capsys.readouterr()
    assert errors == ""
    for words in ("Usage:", "--adapter NAME", "Ctrl-C", "Exit codes:", "Examples:"):
        assert words in text


def test_asking_a_run_that_is_trained(run: Path, capsys: Capture) -> None:
    with RunLock(run):
        assert main(["run", "--adapter", "qa"]) == 0
        assert main(["--adapter", "qa", "run"]) == 0
    assert capsys.readouterr() == ("asked run to stop: qa\n" * 2, "")
    assert [(request.action, request.adapter) for request in Inbox(run).take()] == [("stop", "qa")], "once is enough"


@pytest.mark.usefixtures("run")
def test_asking_a_run_that_nobody_trains(capsys: Capture) -> None:
    assert main(["run", "--adapter", "qa"]) == 0
    assert "when the run is resumed: python -m moe_peft.train run/config.yaml\n" in capsys.readouterr().out


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["run"], ["--adapter"]),
        (["--adapter", "qa"], ["FOLDER"]),
        (["run", "--adapter", "q"], ["run has no adapter 'q'; did you mean 'qa'?"]),
        (["run", "--adapter", "qa", "--adapter", "mix"], ["'mix' has ended already, it is done: there is nothing"]),
        (["ran", "--adapter", "qa"], ["there is no run folder ran; did you mean 'run'?"]),
    ],
)
def test_a_mistake_is_told_and_leaves_no_trace(argv: list[str], words: list[str], capsys: Capture) -> None:
    assert_refused(main, argv, capsys, *words)
