"""Jobs that join and leave a process that trains, through the commands, and when the process is killed on the way."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from tiny_run import adapter_entry, run_config, train

from moe_peft import status, stop, submit
from moe_peft.training.folder.inbox import Inbox
from moe_peft.training.folder.journal import read_journal
from moe_peft.training.folder.metrics import read_metrics
from moe_peft.training.folder.run_status import JobStatus, read_run

SECONDS = 120.0  # for whatever a process needs, on a busy machine
ENDLESS = 10**6


def write_config(path: Path, base: Path, *entries: dict[str, Any], **keys: Any) -> str:
    config = run_config(base, path.parent / "run", *entries, num_threads=1, **keys)
    path.write_text(config.to_yaml())
    return str(path)


def start(*command: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


@pytest.fixture
def processes() -> Iterator[list["subprocess.Popen[bytes]"]]:
    """Those that are killed at the end, however the test ends."""
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()


def job_of(run: Path, name: str) -> JobStatus | None:
    try:
        return next((job for job in read_run(run).jobs if job.name == name), None)
    except (FileNotFoundError, ValueError):  # not there yet
        return None


def wait_for(run: Path, name: str, holds: Callable[[JobStatus], bool], process: "subprocess.Popen[bytes]") -> JobStatus:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        has_ended = process.poll() is not None
        job = job_of(run, name)
        if job is not None and holds(job):
            return job
        assert not has_ended, process.stderr.read() if process.stderr else ""
        time.sleep(0.05)
    raise AssertionError(f"{name}: {job_of(run, name)}")


def first_loss(run: Path, name: str) -> float:
    rows = read_metrics(run / "metrics.jsonl")
    return next(row["loss"] for row in rows if row["event"] == "step" and row["adapter"] == name)


def test_one_joins_one_is_stopped_and_status_tells(
    base: Path, data: str, tmp_path: Path, processes: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    entries = [adapter_entry("qa", data, max_steps=ENDLESS), adapter_entry("last", data)]
    config = write_config(tmp_path / "config.yaml", base, *entries, max_concurrent_adapters=1)
    processes.append(process := start("-m", "moe_peft.train", config))
    wait_for(run, "qa", lambda job: job.step >= 2, process)

    late = adapter_entry("late", data, method="mixlora", num_experts=4, max_steps=4, template=str(base / "short.yaml"))
    (tmp_path / "more.yaml").write_text(yaml.safe_dump({"adapters": [late, {**late, "name": "never"}]}))
    assert submit.main([str(tmp_path / "more.yaml"), "--run", str(run)]) == 0
    taken_in = wait_for(run, "late", lambda job: job.asked is None, process)
    assert taken_in.state == "queued", "there is one place, and qa has it"
    capsys.readouterr()
    assert status.main([str(run), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["trained_by"] == f"process {process.pid}"
    assert [(job["name"], job["state"]) for job in told["jobs"]] == [
        *[("qa", "running"), ("last", "queued"), ("late", "queued"), ("never", "queued")]
    ]

    assert stop.main([str(run), "--adapter", "never"]) == 0
    wait_for(run, "never", lambda job: job.state == "stopped", process)
    steps_before = wait_for(run, "qa", lambda job: job.step >= 5, process).step
    assert stop.main([str(run), "--adapter", "qa"]) == 0
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 3, errors

    jobs = {job.name: job for job in read_run(run).jobs}
    assert {name: job.state for name, job in jobs.items()} == {
        "qa": "stopped",
        "last": "done",
        "late": "done",
        "never": "stopped",
    }
    assert steps_before <= jobs["qa"].step < ENDLESS
    assert (jobs["late"].step, jobs["never"].step, jobs["never"].saved_to) == (4, 0, None)
    for name in ("qa", "last", "late"):
        folder = jobs[name].saved_to
        assert folder is not None
        assert all(weight.isfinite().all() for weight in load_file(folder / "adapter_model.safetensors").values())
    alone = train(run_config(base, tmp_path / "alone", late))
    assert first_loss(run, "late") == pytest.approx(first_loss(alone.run_dir, "late"), rel=1e-5)

    capsys.readouterr()
    assert status.main([str(run)]) == 0
    assert "; complete\n" in capsys.readouterr().out
    assert submit.main([str(tmp_path / "more.yaml"), "--run", str(run)]) == 2
    assert "is complete" in capsys.readouterr().err


def test_what_nobody_was_there_to_hear_happens_at_the_resume(
    base: Path, data: str, tmp_path: Path, processes: list[Any]
) -> None:
    run = tmp_path / "run"
    config = write_config(tmp_path / "config.yaml", base, adapter_entry("qa", data, max_steps=ENDLESS), save_steps=2)
    processes.append(process := start("-m", "moe_peft.train", config))
    wait_for(run, "qa", lambda job: job.step >= 5, process)
    process.kill()
    process.wait()
    (tmp_path / "more.yaml").write_text(yaml.safe_dump({"adapters": [adapter_entry("late", data)]}))
    assert submit.main([str(tmp_path / "more.yaml"), "--run", str(run)]) == 0
    assert stop.main([str(run), "--adapter", "qa"]) == 0
    assert read_run(run).trained_by is None
    processes.append(process := start("-m", "moe_peft.train", str(run / "config.yaml")))
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 3, errors
    assert {job.name: job.state for job in read_run(run).jobs} == {"qa": "stopped", "late": "done"}


def test_bad_files_in_the_inbox_are_refused_and_hurt_nobody(
    base: Path, data: str, tmp_path: Path, processes: list[Any]
) -> None:
    run = tmp_path / "run"
    config = write_config(tmp_path / "config.yaml", base, adapter_entry("qa", data, max_steps=ENDLESS))
    processes.append(process := start("-m", "moe_peft.train", config))
    wait_for(run, "qa", lambda job: job.step >= 1, process)
    inbox, elsewhere = Inbox(run), Inbox(tmp_path / "elsewhere")
    inbox.folder.mkdir(exist_ok=True)
    torn = f"{1:020d}-00000000"
    (inbox.folder / f"{torn}.json").write_text('{"version": 1, "act')
    qa = read_run(run).jobs[0].job
    assert qa is not None
    # What the commands would have refused, but a file that somebody made can hold.
    foreign = dataclasses.replace(qa.adapter, target_modules=("q_proj",))
    with inbox.lock():
        inbox.put_job(qa)
        inbox.put_job(dataclasses.replace(qa, name="nodata", data="/nowhere/train.jsonl"))
        # Spoiled aside, then moved in whole: the run may take a file the moment it is in the inbox.
        with elsewhere.lock():
            elsewhere.put_job(dataclasses.replace(qa, name="badtarget", adapter=foreign))
        (made,) = elsewhere.folder.glob("*.json")
        made.write_text(made.read_text().replace('"q_proj"', '"w_proj"'))
        made.rename(inbox.folder / made.name)
        inbox.put_stop("nobody")
    for name, words in ((torn, "cannot be read"), ("nodata", "no data file"), ("badtarget", "w_proj")):
        job = wait_for(run, name, lambda job: job.state == "refused", process)
        assert words in str(job.reason)
    step = read_run(run).jobs[0].step
    wait_for(run, "qa", lambda job: job.state == "running" and job.step > step, process)
    assert [job.state for job in read_run(run).jobs if job.name == "qa"] == ["running", "refused"]
    assert stop.main([str(run), "--adapter", "qa"]) == 0
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 3, errors
    assert inbox.take() == []


SCRIPT = """
import dataclasses, os, signal, sys
from pathlib import Path
from moe_peft.config import TrainConfig
from moe_peft.train import main
from moe_peft.training.fused_run import FusedRun
from moe_peft.training.folder.inbox import Inbox
from moe_peft.training.folder.journal import Journal

config, moment = sys.argv[1:]
run = Path(config).parent / "run"
inbox, take_step = Inbox(run), FusedRun.take_step
late = dataclasses.replace(TrainConfig.from_file(config).adapters[0], name="late", max_steps=6, seed=5)

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def ask_then(self, micro_batches):
    stepped = take_step(self, micro_batches)
    for step, put in ((7, lambda: inbox.put_job(late)), (11, lambda: inbox.put_stop("qa"))):
        mark = run.parent / f"asked-at-{step}"
        if self.fused_step == step and not mark.exists():
            mark.touch()
            with inbox.lock():
                put()
            if moment == f"journaled at {step}":
                Inbox.remove = die
    if moment == "after both" and self.fused_step == 13:
        die()
    return stepped

FusedRun.take_step = ask_then
sys.exit(main([config]))
"""
MOMENTS = ["journaled at 7", "journaled at 11", "after both"]


def outcome(run: Path) -> tuple[dict[str, bytes], list[dict[str, Any]], list[tuple[int, str, str]]]:
    """The adapters, the rows without their times, and the journal of a run."""
    adapters = {path.parent.name: path.read_bytes() for path in run.glob("adapters/*/adapter_model.safetensors")}
    times = ("seconds", "tokens_per_second")
    rows = [
        {key: value for key, value in row.items() if key not in times} for row in read_metrics(run / "metrics.jsonl")
    ]
    entries = read_journal(run / "journal.jsonl")
    return adapters, rows, [(entry.fused_step, entry.request.action, entry.request.adapter) for entry in entries]


@pytest.mark.slow
def test_kills_around_requests_change_nothing(base: Path, data: str, tmp_path: Path) -> None:
    """Killed as soon as a request is written down, again at the next one, and again later, a run ends in the bits of
    one that was left alone."""

    def run_until_done(place: Path, *kills: str) -> Path:
        place.mkdir()
        entries = [adapter_entry("qa", data, max_steps=30), adapter_entry("mix", data, method="mixlora", max_steps=9)]
        config = write_config(place / "config.yaml", base, *entries, save_steps=5)
        for moment in (*kills, "never"):
            process = start("-c", SCRIPT, config, moment)
            _, errors = process.communicate(timeout=SECONDS)
            # The last one ends well, but for qa, which was stopped.
            assert process.returncode == (3 if moment == "never" else -signal.SIGKILL), (moment, errors)
        return place / "run"

    adapters, rows, journal = outcome(run_until_done(tmp_path / "alone"))
    assert journal == [(7, "submit", "late"), (11, "stop", "qa")]
    assert sorted(adapters) == ["late", "mix", "qa"]
    ends = {row["adapter"]: (row["state"], row["step"]) for row in rows if row["event"] == "job"}
    assert (ends["mix"], ends["late"], ends["qa"][0]) == (("done", 9), ("done", 6), "stopped")
    killed = outcome(run_until_done(tmp_path / "killed", *MOMENTS))
    assert killed[2] == journal
    assert killed[1] == rows
    assert killed[0] == adapters
