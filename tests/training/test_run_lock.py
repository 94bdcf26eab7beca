"""One process trains in a run's folder; others are told which."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from moe_peft.training.folder import run_lock
from moe_peft.training.folder.run_lock import RunLock, holder, is_locked

HOLD = """
import sys
from moe_peft.training.folder.run_lock import RunLock
RunLock(sys.argv[1]).acquire()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "PATIENCE", 0.2)


def test_a_second_one_is_refused_with_folder_and_process(tmp_path: Path) -> None:
    assert not is_locked(tmp_path)
    assert holder(tmp_path) is None
    with RunLock(tmp_path) as lock:
        assert is_locked(tmp_path)
        assert holder(tmp_path) == f"process {os.getpid()}"
        with pytest.raises(ValueError, match=rf"{tmp_path} is being trained by process {os.getpid()}: two processes"):
            RunLock(tmp_path).acquire()
        assert is_locked(tmp_path), "a refusal takes nothing away"
        lock.release()
        assert not is_locked(tmp_path)
    with RunLock(tmp_path):
        assert is_locked(tmp_path)
    assert not is_locked(tmp_path)


def test_it_ends_with_its_process_however_that_ends(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"process {process.pid}"):
            RunLock(tmp_path).acquire()
        process.kill()
        process.wait()
    assert not is_locked(tmp_path)
    with RunLock(tmp_path):
        assert holder(tmp_path) == f"process {os.getpid()}"


def test_a_probe_that_holds_it_for_a_moment_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "PATIENCE", 10.0)
    (tmp_path / run_lock.FILE).touch()
    handle = os.open(tmp_path / run_lock.FILE, os.O_RDONLY)
    assert run_lock.try_lock(handle, shared=True)
    prober = threading.Thread(target=lambda: (time.sleep(0.3), os.close(handle)))
    prober.start()
    with RunLock(tmp_path):
        assert is_locked(tmp_path)
    prober.join()


def test_two_probes_do_not_see_each_other(tmp_path: Path) -> None:
    (tmp_path / run_lock.FILE).touch()
    handle = os.open(tmp_path / run_lock.FILE, os.O_RDONLY)
    assert run_lock.try_lock(handle, shared=True)
    assert not is_locked(tmp_path)
    os.close(handle)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "another process"),
        ("{torn", "another process"),
        ("[]", "another process"),
        ('{"pid": "x", "host": "h"}', "another process"),
        (json.dumps({"pid": 7, "host": "far-away"}), "process 7 on far-away"),
    ],
)
def test_what_stands_in_it_may_be_torn_or_of_another_machine(tmp_path: Path, content: str, told: str) -> None:
    with RunLock(tmp_path):
        (tmp_path / run_lock.FILE).write_text(content)
        assert holder(tmp_path) == told
