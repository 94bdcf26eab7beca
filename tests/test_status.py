"""``moe-peft status``: the table, the JSON, and the watching."""

import io
import json
import time
from pathlib import Path

import pytest
from refusal import assert_refused
from rich.console import Console
from run_maker import make_run, step_row

from moe_peft import status
from moe_peft.status import main
from moe_peft.training.folder.inbox import Inbox
from moe_peft.training.folder.metrics import JOB_STATES, JobMetrics, MetricsWriter

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run in the current folder."""
    monkeypatch.chdir(tmp_path)
    return make_run(Path("run"), step_row("qa", 1))


def test_help_teaches_every_state(capsys: Capture) -> None:
    assert main(["--help"]) == 0
    text, errors = capsys.readouterr()
    assert errors == ""
    for words in ("Usage:", "--watch", "--json", "Exit codes:", "Examples:", *JOB_STATES):
        assert words in text


@pytest.mark.usefixtures("run")
def test_the_table_is_printed_once(capsys: Capture) -> None:
    assert main(["run"]) == 0
    text, errors = capsys.readouterr()
    assert errors == ""
    assert text.startswith("run: 1 queued, 1 running; no process trains it; to resume: python -m moe_peft.train run/")
    assert [line.split()[:4] for line in text.splitlines() if "lora" in line] == [
        ["qa", "lora", "running", "1/40"],
        ["mix", "mixlora", "queued", "0"],
    ]


@pytest.mark.usefixtures("run")
def test_json_is_one_object(capsys: Capture) -> None:
    assert main(["--json", "run"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(job["name"], job["state"], job["step"]) for job in told["jobs"]] == [
        ("qa", "running", 1),
        ("mix", "queued", 0),
    ]


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["FOLDER"]),
        (["runn"], ["there is no run folder runn; did you mean 'run'?"]),
        (["."], ["has no config.yaml"]),
        (["run", "--watch", "--json"], ["--watch is for people and --json for programs"]),
        (["run", "--watch"], ["--watch needs a terminal"]),
        (["run", "--jason"], ["did you mean '--json'?"]),
    ],
)
def test_a_mistake_is_told(argv: list[str], words: list[str], capsys: Capture) -> None:
    assert_refused(main, argv, capsys, *words)


class Watched:
    """A terminal, and a clock whose pauses let the run go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *events: object) -> None:
        self.console = Console(file=io.StringIO(), width=120, force_terminal=True)
        self.pauses: list[float] = []
        self._events = iter(events)
        monkeypatch.setattr(time, "sleep", self._sleep)

    def _sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        event = next(self._events)
        if isinstance(event, BaseException):
            raise event
        event()  # type: ignore[operator]

    @property
    def text(self) -> str:
        return self.console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_watching_follows_the_run_to_its_end(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def go_on() -> None:
        with MetricsWriter(run / "metrics.jsonl") as metrics:
            metrics.take(step_row("qa", 39))
            metrics.take(JobMetrics(adapter="mix", state="early-stopped", step=5))

    watched = Watched(monkeypatch, go_on, Inbox(run).close)
    status.watch(run, watched.console)
    assert len(watched.pauses) == 2
    assert all(pause >= status.PAUSE for pause in watched.pauses)
    for words in ("1/40", "39/40", "early-stopped", "; complete"):
        assert words in watched.text
    assert watched.text.index("1/40") < watched.text.index("39/40") < watched.text.index("; complete")


def test_ctrl_c_ends_the_watching_well(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, KeyboardInterrupt())
    status.watch(run, watched.console)
    assert "1/40" in watched.text
