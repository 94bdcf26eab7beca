"""What the files in a run's folder tell of its jobs, at every moment of its life."""

import math
from pathlib import Path

import pytest
from run_maker import eval_row, make_run, put_job, put_stops, step_row

from moe_peft.training.folder.inbox import Inbox
from moe_peft.training.folder.journal import Journal
from moe_peft.training.folder.metrics import ExpertMetrics, JobMetrics, MetricsWriter
from moe_peft.training.folder.run_lock import RunLock
from moe_peft.training.folder.run_status import JobStatus, read_run


def jobs_of(run: Path) -> dict[str, JobStatus]:
    return {job.name: job for job in read_run(run).jobs}


def test_a_run_that_has_not_begun(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    status = read_run(run)
    assert status.folder == run
    assert status.config.base_model == "/models/tiny"
    assert (status.trained_by, status.is_complete) == (None, False)
    assert [(job.name, job.state, job.step, job.num_steps) for job in status.jobs] == [
        ("qa", "queued", 0, 40),
        ("mix", "queued", 0, None),
    ]
    assert status.jobs[1].job is not None
    assert status.jobs[1].job.method == "mixlora"


def test_the_rows_add_up(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "run",
        *(JobMetrics(adapter=name, state=state) for state in ("queued", "running") for name in ("qa", "mix")),
        eval_row("mix", 0, 3.0),
        *(step_row("mix", number, num_steps=7, loss=3.0 / number) for number in range(1, 4)),
        ExpertMetrics(adapter="mix", step=3, counts=((5, 6),)),
        eval_row("mix", 2, 1.25),
        step_row("qa", 1, num_supervised_tokens=1000, seconds=100.0),
        *(step_row("qa", number) for number in range(2, 22)),
        step_row("qa", 22, loss=math.nan, skipped="loss nan", skipped_steps=1),
        eval_row("mix", 3, 1.5),
    )
    mix, qa = jobs_of(run)["mix"], jobs_of(run)["qa"]
    assert (mix.state, mix.step, mix.num_steps, mix.loss) == ("running", 3, 7, 1.0)
    assert mix.evals == ((0, 3.0), (2, 1.25), (3, 1.5))
    assert (mix.eval_loss, mix.best_eval_loss) == (1.5, 1.25)
    assert (mix.num_supervised_tokens, mix.num_tokens, mix.seconds) == (90, 150, 1.5)
    assert (qa.step, qa.num_steps, qa.loss, qa.skipped_steps) == (22, 40, None, 1)
    assert (qa.eval_loss, qa.best_eval_loss) == (None, None)
    assert qa.tokens_per_second == pytest.approx(60.0), "the pace of the latest steps: the slow first one is forgotten"
    assert qa.num_supervised_tokens == 1000 + 21 * 30
    assert (mix.reason, mix.saved_to, mix.asked) == (None, None, None)


def test_a_loss_that_was_not_finite_is_no_best(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", eval_row("qa", 0, 2.0), eval_row("qa", 1, math.inf))
    assert jobs_of(run)["qa"].evals == ((0, 2.0), (1, None))
    assert (jobs_of(run)["qa"].eval_loss, jobs_of(run)["qa"].best_eval_loss) == (None, 2.0)


@pytest.mark.parametrize("state", ["done", "early-stopped", "halved", "stopped", "failed"])
def test_how_a_job_ended(tmp_path: Path, state: str) -> None:
    end = JobMetrics(adapter="qa", state=state, step=3, reason="because", saved_to="adapters/qa")
    run = make_run(tmp_path / "run", step_row("qa", 1), step_row("qa", 2), step_row("qa", 3), end)
    qa = jobs_of(run)["qa"]
    assert (qa.state, qa.step, qa.num_steps, qa.reason) == (state, 3, 40, "because")
    assert qa.saved_to == run / "adapters" / "qa"
    assert not qa.is_under_way
    assert jobs_of(run)["mix"].is_under_way


def test_a_sweep_member_that_waits_and_goes_on(tmp_path: Path) -> None:
    waits = JobMetrics(adapter="qa", state="waiting", step=1)
    run = make_run(tmp_path / "run", step_row("qa", 1), waits)
    assert (jobs_of(run)["qa"].state, jobs_of(run)["qa"].is_under_way) == ("waiting", True)
    goes_on = JobMetrics(adapter="qa", state="running", step=1)
    run = make_run(tmp_path / "again", step_row("qa", 1), waits, goes_on, step_row("qa", 2))
    assert (jobs_of(run)["qa"].state, jobs_of(run)["qa"].step) == ("running", 2)


def test_a_submitted_job_from_the_inbox_to_its_end(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    put_job(run, "late")

    def late() -> tuple[str, str | None, int]:
        names = [job.name for job in read_run(run).jobs]
        assert names == ["qa", "mix", "late"], "it is told once, wherever its request lies"
        return (jobs_of(run)["late"].state, jobs_of(run)["late"].asked, jobs_of(run)["late"].step)

    assert late() == ("queued", "submit", 0)
    inbox, journal = Inbox(run), Journal(run / "journal.jsonl")
    journal.append(0, inbox.take()[0])
    assert late() == ("queued", None, 0), "killed before the file was removed"
    inbox.remove(inbox.take()[0])
    assert late() == ("queued", None, 0)
    with MetricsWriter(run / "metrics.jsonl") as metrics:
        metrics.take(JobMetrics(adapter="late", state="queued"))
        metrics.take(JobMetrics(adapter="late", state="running"))
        metrics.take(step_row("late", 1))
    assert late() == ("running", None, 1)


def test_stops_that_have_not_happened_yet(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", step_row("qa", 1), JobMetrics(adapter="mix", state="done", step=9))
    put_stops(run, "qa", "mix", "nobody")
    assert {job.name: job.asked for job in read_run(run).jobs} == {"qa": "stop", "mix": None}
    journal = Journal(run / "journal.jsonl")
    journal.take_in(Inbox(run), 5)
    assert {job.name: job.asked for job in read_run(run).jobs} == {"qa": "stop", "mix": None}
    with MetricsWriter(run / "metrics.jsonl") as metrics:
        metrics.take(JobMetrics(adapter="qa", state="stopped", step=1))
    assert {job.name: job.asked for job in read_run(run).jobs} == {"qa": None, "mix": None}


def test_a_refused_submission_shows_why_and_can_be_mended(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    inbox, journal = Inbox(run), Journal(run / "journal.jsonl")
    put_job(run, "late")
    journal.take_in(inbox, 0)
    refusal = JobMetrics(adapter="late", state="refused", reason="no target module 'w_proj'")
    with MetricsWriter(run / "metrics.jsonl") as metrics:
        metrics.take(refusal)
    assert [(job.name, job.state, job.reason) for job in read_run(run).jobs][2:] == [
        ("late", "refused", "no target module 'w_proj'")
    ]
    assert journal.due(0, 0)
    put_job(run, "late")
    journal.take_in(inbox, 4)
    with MetricsWriter(run / "metrics.jsonl") as metrics:
        metrics.take(JobMetrics(adapter="late", state="queued"))
        metrics.take(step_row("late", 1))
    assert [(job.state, job.step) for job in read_run(run).jobs][2:] == [("refused", 0), ("running", 1)]


def test_a_refusal_never_falls_on_a_job_that_runs(tmp_path: Path) -> None:
    """A second job of its name, or a file that only bears it."""
    run = make_run(tmp_path / "run", step_row("qa", 1))
    put_job(run, "qa")
    Journal(run / "journal.jsonl").take_in(Inbox(run), 1)
    with MetricsWriter(run / "metrics.jsonl") as metrics:
        metrics.take(JobMetrics(adapter="qa", state="refused", reason="the name is taken"))
        metrics.take(JobMetrics(adapter="qa", state="refused", reason="the request x.json cannot be read: why"))
        metrics.take(JobMetrics(adapter="00007-0", state="refused", reason="the request y.json cannot be read: why"))
        metrics.take(step_row("qa", 2))
    found = [(job.name, job.state, job.step, job.job is not None) for job in read_run(run).jobs]
    assert found == [
        ("qa", "running", 2, True),
        ("mix", "queued", 0, True),
        ("qa", "refused", 0, True),
        ("qa", "refused", 0, False),
        ("00007-0", "refused", 0, False),
    ]


def test_whether_somebody_trains_and_whether_all_is_over(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with RunLock(run):
        assert str(read_run(run).trained_by).startswith("process ")
    assert read_run(run).trained_by is None
    assert not read_run(run).is_complete
    Inbox(run).close()
    assert read_run(run).is_complete


def test_a_row_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", step_row("qa", 1))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"event": "step", "adapter": "qa", "st')
    assert jobs_of(run)["qa"].step == 1


def test_looking_changes_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", step_row("qa", 1))
    put_stops(run, "qa")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    read_run(run)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    make_run(tmp_path / "run-001")
    with pytest.raises(FileNotFoundError, match=r"there is no run folder .*run-0001; did you mean '.*/run-001'\?"):
        read_run(tmp_path / "run-0001")
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match=r"other has no config.yaml: it is not the folder of a training run"):
        read_run(tmp_path / "other")
