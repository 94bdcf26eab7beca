"""The console: a table that fits the terminal, plain and rare lines in a log."""

import io
import re

import pytest
from rich.console import Console

from moe_peft.training.metrics import EvalMetrics, StepMetrics
from moe_peft.training.progress import Progress, format_seconds


class Clock:
    """Seconds that pass only when told."""

    now = 100.0

    def __call__(self):
        return self.now


def make_step(adapter="qa", step=1, num_steps=50, **changes):
    fields = {
        "adapter": adapter,
        "step": step,
        "num_steps": num_steps,
        "epoch": 0.1,
        "loss": 2.5,
        "aux_loss": 0.0,
        "lr": 2e-4,
        "grad_norm": 1.5,
        "num_supervised_tokens": 40,
        "num_tokens": 120,
        "seconds": 2.0,
        "tokens_per_second": 83.3,
    }
    return StepMetrics(**{**fields, **changes})


def make_console(width=80, **options):
    return Console(file=io.StringIO(), width=width, **options)


def written(console):
    return console.file.getvalue()


def test_format_seconds():
    texts = [format_seconds(seconds) for seconds in (0, 59.4, 75, 3675, -1)]
    assert texts == ["0:00", "0:59", "1:15", "1:01:15", "0:00"]


def test_a_log_gets_first_due_and_last_steps():
    console, clock = make_console(), Clock()
    with Progress({"qa": 50}, console, seconds_between_lines=10, clock=clock) as progress:
        for step in range(1, 51):
            progress.step(make_step(step=step))
            clock.now += 1.0
    steps = [int(step) for step in re.findall(r"step (\d+)/50", written(console))]
    assert steps == [1, 11, 21, 31, 41, 50]


def test_a_log_line_holds_everything_and_no_control_codes():
    console, clock = make_console(width=20), Clock()
    with Progress({"qa": 50}, console, clock=clock) as progress:
        progress.step(make_step(step=10, aux_loss=0.0123))
        progress.eval(EvalMetrics(adapter="qa", step=10, eval_loss=1.25, num_supervised_tokens=9))
        progress.message("saved to runs/[qa]")
        progress.done("qa", "failed: non-finite loss")
    assert written(console).splitlines() == [
        "qa  step 10/50  loss 2.5000  aux 0.0123  lr 2.00e-04  83 tok/s  1:20 left",
        "qa  step 10/50  held-out loss 1.2500",
        "saved to runs/[qa]",
        "qa  failed: non-finite loss",
    ]
    assert "\x1b" not in written(console)


def test_the_time_left_follows_the_latest_pace():
    console, clock = make_console(), Clock()
    progress = Progress({"qa": 200}, console, seconds_between_lines=0, clock=clock)
    for step in range(1, 101):
        progress.step(make_step(step=step, num_steps=200))
        clock.now += 9.0 if step < 70 else 0.5
    assert written(console).splitlines()[-1].endswith("0:50 left")


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_the_table_fits_and_loses_no_number(width):
    console = make_console(width=width, force_terminal=True, color_system=None)
    progress = Progress({"a_name_longer_than_any_column": 1000, "home": 60}, console)
    progress.step(make_step("home", 12, 60, loss=1.234, aux_loss=0.0412, tokens_per_second=123.4))
    progress.eval(EvalMetrics(adapter="home", step=0, eval_loss=2.1, num_supervised_tokens=9))
    progress.eval(EvalMetrics(adapter="home", step=10, eval_loss=0.9, num_supervised_tokens=9))
    progress.eval(EvalMetrics(adapter="home", step=12, eval_loss=0.7, num_supervised_tokens=9))
    with console.capture() as capture:
        console.print(progress.table())
    lines = capture.get().splitlines()
    assert all(len(line) <= width for line in lines)
    row = next(line for line in lines if "home" in line)
    for cell in ("12/60", "1.234", "0.0412", "2.0e-04", "123", "1:36", "2.100 → 0.700"):
        assert cell in row
    assert "0/1000" in next(line for line in lines if "a_name" in line)


def test_a_terminal_gets_the_table_and_messages_above_it():
    console = make_console(force_terminal=True, width=100)
    with Progress({"qa": 2, "home": 2}, console) as progress:
        progress.step(make_step("qa", 1, 2))
        progress.message("a word")
        progress.done("qa", "done")
        progress.done("home", "stopped: non-finite loss")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written(console))
    last_table = text[text.rindex("held-out loss") :]
    assert "a word" in text[: text.rindex("held-out loss")]
    assert "home  stopped: non-finite loss" in text and "qa  done" not in text
    assert re.search(r"qa .*done", last_table) and re.search(r"home .*ended", last_table)


def test_a_dumb_terminal_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    console = make_console(force_terminal=True)
    with Progress({"qa": 2}, console) as progress:
        progress.step(make_step("qa", 1, 2))
    assert written(console).startswith("qa  step 1/2")
