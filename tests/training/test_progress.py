"""The console: a picture that fits the terminal, plain and rare lines in a log."""

import io
import re

import pytest
from rich.console import Console

from moe_peft.training.display.adapter_progress import AdapterProgress, Trend
from moe_peft.training.display.progress import Progress, format_seconds
from moe_peft.training.display.progress_table import listed, shortened
from moe_peft.training.folder.metrics import EvalMetrics, ExpertMetrics, JobMetrics, StepMetrics


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


def picture_lines(progress, console):
    with console.capture() as capture:
        console.print(progress.table())
    return capture.get().splitlines()


def take_steps(progress, adapter, steps, clock=None, **changes):
    """The rows of the first steps of an adapter that has 100, one fused step each."""
    for step in range(1, steps + 1):
        if clock is not None:
            clock.now += 1.0
        progress.take(make_step(adapter, step, 100, fused_step=step, loss=4.0 - 0.03 * step, **changes))


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_the_picture_fits_and_loses_nothing_asked_for(width):
    console, clock = make_console(width=width, height=24, force_terminal=True, color_system=None), Clock()
    progress = Progress({"a_name_longer_than_any_column": 100}, console, max_batch_tokens=400, clock=clock)
    moe = ExpertMetrics(adapter="home-moe", step=12, counts=((30, 0, 10, 20), (15, 15, 15, 15)))
    progress.take(EvalMetrics(adapter="home-moe", step=0, eval_loss=2.1, num_supervised_tokens=9))
    take_steps(progress, "home-moe", 12, clock, aux_loss=0.0412, skipped_steps=3, num_tokens=100)
    progress.take(EvalMetrics(adapter="home-moe", step=12, eval_loss=0.7, num_supervised_tokens=9))
    progress.take(moe)
    take_steps(progress, "a_name_longer_than_any_column", 2, clock, num_tokens=300)
    lines = picture_lines(progress, console)
    assert all(len(line) <= width for line in lines)
    row = next(line for line in lines if "home-moe" in line).split()
    # 88 steps are left at one a second; experts: 30 of 60 tokens on one of four, and one without any.
    for cell in ("12/100", "3.640", "0.700", "83", "25%", "1:28", "2.0×", "dead", "3"):
        assert cell in row
    assert "█▇▅▄▂▁" in row or "█▇▇▆▅▅▄▄▃▂▂▁" in row
    assert "2/100" in next(line for line in lines if "lumn " in line)
    # The held-out loss of before and the router losses, for which nobody asked, are there where there is room.
    assert ("2.100" in row, "0.0412" in row) == (width == 200, width == 200)


@pytest.mark.parametrize("height", [12, 24, 60])
def test_twenty_adapters_never_overflow_a_terminal(height):
    console = make_console(width=80, height=height, force_terminal=True, color_system=None)
    names = [f"customer-{i:02d}" for i in range(20)]
    progress = Progress(dict.fromkeys(names, 100), console)
    for name in names:
        progress.take(JobMetrics(adapter=name, state="running"))
        take_steps(progress, name, 3)
    lines = picture_lines(progress, console)
    shown = {name for name in names if any(line.startswith(name) for line in lines)}
    assert len(lines) < height and shown
    assert len(shown) == 20 or any(line.startswith(f"running {20 - len(shown)}") for line in lines)
    for i, name in enumerate(names[:18]):
        progress.take(JobMetrics(adapter=name, state="failed" if i == 5 else "done", step=100))
    lines = picture_lines(progress, console)
    assert not any(line.startswith(tuple(names[:18])) for line in lines)
    assert sum(line.startswith(("customer-18", "customer-19")) for line in lines) == 2
    finished = next(line for line in lines if line.startswith("finished 17"))
    assert "customer-00, customer-01" in finished and finished.endswith("more")
    assert any(line.startswith("ended 1") and "customer-05 (failed)" in line for line in lines)


def test_the_queue_stands_in_one_line_until_its_places_come():
    console = make_console(width=80, force_terminal=True, color_system=None)
    progress = Progress({f"c{i}": 9 for i in range(30)}, console)
    progress.take(JobMetrics(adapter="c0", state="running"))
    progress.take(JobMetrics(adapter="c29", state="waiting", step=4))
    progress.take(JobMetrics(adapter="late", state="queued", fused_step=3))
    lines = picture_lines(progress, console)
    assert lines[0].startswith("1 running · 29 queued · 0 of 31 finished")
    (queue,) = (line for line in lines if line.startswith("queued 29"))
    assert "c1, c2, c3" in queue and len(queue) <= 80
    assert any(line.startswith("waiting 1") and "c29" in line for line in lines)
    assert any(line.startswith("c0 ") and "0/9" in line for line in lines)


def test_a_log_tells_states_and_the_queue_once():
    console = make_console()
    progress = Progress({"qa": 2, "home": 2, "late": 2}, console)
    for name in ("qa", "home", "late"):
        progress.take(JobMetrics(adapter=name, state="queued"))
    progress.take(JobMetrics(adapter="qa", state="running"))
    progress.take(make_step("qa", 1, 2))
    progress.take(make_step("qa", 2, 2, skipped="gradient norm inf", skipped_steps=1))
    progress.take(JobMetrics(adapter="qa", state="failed", step=2, reason="gradient norm inf", fused_step=2))
    progress.take(JobMetrics(adapter="home", state="running", fused_step=2))
    progress.take(JobMetrics(adapter="odd", state="refused", reason="name='odd' [taken]", fused_step=3))
    lines = written(console).splitlines()
    assert lines[0] == "2 queued: home, late"
    assert lines[1].startswith("qa  step 1/2  loss 2.5000")
    assert lines[2] == "Warning: qa, step 2 was skipped: gradient norm inf"
    assert lines[3].startswith("qa  step 2/2") and "  1 skipped  " in lines[3]
    assert lines[4:] == [
        "qa  failed: gradient norm inf",
        "home  running",
        "1 queued: late",
        "odd  refused: name='odd' [taken]",
    ]


def test_many_adapters_do_not_flood_a_log():
    console, clock = make_console(), Clock()
    names = [f"c{i}" for i in range(20)]
    progress = Progress(dict.fromkeys(names, 1000), console, clock=clock)
    for step in range(1, 201):
        for name in names:
            progress.take(make_step(name, step, 1000))
        clock.now += 1.0
    # 200 s: each its first step, then one line every 40 s rather than every 10.
    assert len(written(console).splitlines()) == 20 * 5


def test_a_resumed_run_goes_on_with_what_was():
    console, clock = make_console(width=120, force_terminal=True, color_system=None), Clock()
    progress = Progress({"qa": 100}, console, max_batch_tokens=1000, clock=clock)
    progress.catch_up(
        [
            JobMetrics(adapter="qa", state="running", fused_step=0),
            EvalMetrics(adapter="qa", step=0, eval_loss=2.1, num_supervised_tokens=9),
            *(make_step("qa", step, 100, fused_step=step, loss=9.0) for step in range(1, 31)),
            JobMetrics(adapter="old", state="done", step=3),
        ]
    )
    assert written(console) == ""
    clock.now += 1e6  # the time between must not become the pace
    for step in (31, 32):
        clock.now += 0.5
        progress.take(make_step("qa", step, 100, fused_step=step, loss=1.0))
    row = next(line for line in picture_lines(progress, console) if line.startswith("qa")).split()
    for cell in ("32/100", "2.100", "0:34", "12%"):
        assert cell in row
    assert any("██" in cell and cell.endswith("▁") for cell in row)


def test_an_adapter_admitted_late_has_its_own_share():
    adapter = AdapterProgress(100)
    adapter.take_job(JobMetrics(adapter="late", state="running", fused_step=500))
    assert adapter.budget_share(1000) is None
    for step in range(1, 61):
        tokens = 100 if step <= 30 else 300
        adapter.take_step(make_step("late", step, 100, fused_step=500 + 2 * step, num_tokens=tokens), 0.0)
        if step == 1:
            assert adapter.budget_share(1000) == pytest.approx(0.05)
    assert adapter.budget_share(1000) == pytest.approx(0.15)  # of its latest steps alone


def test_a_trend_keeps_the_course_of_any_length():
    for length in (1, 5, 63, 64, 1000, 12345):
        trend = Trend()
        for i in range(length):
            trend.add(float(length - i))
        blocks = trend.blocks(8)
        assert len(blocks) == min(8, length)
        assert list(blocks) == sorted(blocks, reverse=True)
        assert length < 8 or (blocks[0] == "█" and blocks[-1] == "▁" and len(set(blocks)) >= 6)
    flat = Trend()
    flat.add(float("nan"))
    assert flat.blocks(8) == ""
    for _ in range(9):
        flat.add(2.0)
    assert set(flat.blocks(8)) == {"▁"}


def test_a_list_of_names_says_how_many_it_leaves_out():
    assert listed(["a", "bb", "c"], 8) == "a, bb, c"
    assert listed(["alpha", "beta", "gamma"], 16) == "alpha and 2 more"
    assert listed(["a" * 50, "b"], 10) == "2"
    assert (shortened("customer-03-moe", 12), shortened("short", 12)) == ("custo…03-moe", "short")


def test_a_terminal_gets_the_picture_and_messages_above_it():
    console = make_console(force_terminal=True, width=100)
    with Progress({"qa": 2, "home": 2, "odd": 2}, console) as progress:
        progress.step(make_step("qa", 1, 2))
        progress.message("a word")
        progress.take(make_step("odd", 1, 2))
        progress.done("qa", "done")
        progress.done("home", "stopped: non-finite loss")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written(console))
    last_picture = text[text.rindex("running ·") :]
    assert "a word" in text[: text.rindex("running ·")]
    assert "home  stopped: non-finite loss" in text and "qa  done" not in text
    assert re.search(r"finished 1 +qa", last_picture) and re.search(r"ended 1 +home \(stopped\)", last_picture)
    assert re.search(r"odd .*1/2", last_picture)


def test_a_dumb_terminal_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    console = make_console(force_terminal=True)
    with Progress({"qa": 2}, console) as progress:
        progress.step(make_step("qa", 1, 2))
    assert written(console).startswith("qa  step 1/2")
