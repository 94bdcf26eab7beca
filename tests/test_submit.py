"""``moe-peft submit``: what it says, what it refuses, and what it leaves in the run's folder."""

from pathlib import Path

import pytest
import yaml
from refusal import assert_refused
from run_maker import make_run
from tiny_run import adapter_entry, instructions, write_jsonl

from moe_peft.submit import HELP, main
from moe_peft.training.folder.inbox import Inbox
from moe_peft.training.folder.run_lock import RunLock
from moe_peft.training.folder.submission import read_submission

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run in the current folder, beside data and a config ``more.yaml``."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(Path("train.jsonl"), instructions(6))
    write("more.yaml", "late", "later")
    return make_run(Path("run"))


def write(path: str, *names: str) -> None:
    entries = [adapter_entry(name, "train.jsonl") for name in names]
    Path(path).write_text(yaml.safe_dump({"adapters": entries}))


def test_help_teaches(capsys: Capture) -> None:
    assert main(["--help"]) == 0
    text, errors = capsys.readouterr()
    assert errors == ""
    for words in ("Usage:", "--run FOLDER", "key=value", "resumed", "Exit codes:", "Examples:"):
        assert words in text


@pytest.mark.usefixtures("run")
def test_the_config_in_the_help_is_one(capsys: Capture) -> None:
    start = HELP.index("  adapters:\n")
    Path("taught.yaml").write_text(HELP[start : HELP.index("\n\n", start)].replace("chats.jsonl", "train.jsonl"))
    assert main(["taught.yaml", "--run", "run"]) == 0
    assert [request.adapter for request in Inbox("run").take()] == ["style"]


def test_into_a_run_that_is_trained(run: Path, capsys: Capture) -> None:
    with RunLock(run):
        assert main(["more.yaml", "adapters.late.lr=0.5", "--run", "run"]) == 0
    assert capsys.readouterr() == ("submitted to run: late, later\n", "")
    jobs = [request.job for request in Inbox(run).take()]
    assert [(job.name, job.lr) for job in jobs if job] == [("late", 0.5), ("later", 0.01)]


def test_into_a_run_that_nobody_trains(run: Path, capsys: Capture) -> None:
    assert main(["--run", "run", "more.yaml"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("submitted to run: late, later\n")
    assert text.endswith("takes effect when the run is resumed: python -m moe_peft.train run/config.yaml\n")
    assert len(Inbox(run).take()) == 2


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["more.yaml"], ["--run"]),
        (["--run", "run"], ["CONFIG"]),
        (["more.yaml", "--run", "runn"], ["there is no run folder runn; did you mean 'run'?"]),
        (["more.yaml", "--run", "."], ["has no config.yaml: it is not the folder of a training run"]),
        (["mor.yaml", "--run", "run"], ["config file 'mor.yaml' does not exist; did you mean 'more.yaml'?"]),
        (["taken.yaml", "--run", "run"], ["the name 'MIX' is taken: run has an adapter 'mix'"]),
        (["more.yaml", "--run", "run", "seed=7"], ["seed=7 must be 0"]),
        (["more.yaml", "--run", "run", "adapters.late.data=t.jsonl"], ["'late'", "there is no data file", "t.jsonl"]),
        (["more.yaml", "--runs", "run"], ["--run"]),
    ],
)
def test_a_mistake_is_told_and_leaves_no_trace(argv: list[str], words: list[str], capsys: Capture) -> None:
    write("taken.yaml", "MIX")
    assert_refused(main, argv, capsys, *words)


def test_a_complete_run_takes_nothing(run: Path, capsys: Capture) -> None:
    Inbox(run).close()
    assert_refused(main, ["more.yaml", "--run", "run"], capsys, "the run in run is complete: start a new one")


def test_a_run_that_becomes_complete_meanwhile_takes_nothing(
    run: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_slowly(*arguments: object) -> object:
        jobs = read_submission(*arguments)  # type: ignore[arg-type]
        assert Inbox(run).close()
        return jobs

    monkeypatch.setattr("moe_peft.submit.read_submission", read_slowly)
    assert main(["more.yaml", "--run", "run"]) == 1
    assert capsys.readouterr() == ("", "error: the run in run is complete: start a new one for more adapters\n")
    assert Inbox(run).take() == []
