"""What was asked of a run is written down before it takes effect, once, and in order."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from run_maker import new_job

from moe_peft.training.folder.inbox import Inbox, Request
from moe_peft.training.folder.journal import Entry, Journal, read_journal


def ask(run: Path, *names: str) -> list[Request]:
    """A job for the first name, stops for the others."""
    inbox = Inbox(run)
    with inbox.lock():
        first = inbox.put_job(new_job(names[0]))
        return [first, *(inbox.put_stop(name) for name in names[1:])]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.jsonl"


def test_entries_read_back_equal(tmp_path: Path, path: Path) -> None:
    assert read_journal(path) == []
    journal = Journal(path)
    assert journal.entries() == ()
    assert not path.exists(), "a run of which nothing is asked has no journal"
    requests = ask(tmp_path, "qa", "style")
    bad = Request(id="x", action="refuse", adapter="x", error="the request x cannot be read: [why] ü")
    for step, request in ((0, requests[0]), (3, requests[1]), (3, bad)):
        journal.append(step, request)
    assert journal.entries() == tuple(read_journal(path)) == Journal(path).entries()
    assert journal.entries() == (Entry(0, requests[0]), Entry(3, requests[1]), Entry(3, bad))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows[0]["job"] == requests[0].job.to_dict()
    assert rows[1] == {"fused_step": 3, "id": requests[1].id, "action": "stop", "adapter": "style"}


def test_taking_in_moves_requests_from_the_inbox_to_the_journal(tmp_path: Path, path: Path) -> None:
    inbox, journal = Inbox(tmp_path), Journal(path)
    journal.take_in(inbox, 0)
    assert not path.exists()
    requests = ask(tmp_path, "qa", "style")
    journal.take_in(inbox, 7)
    assert inbox.take() == []
    assert journal.entries() == tuple(Entry(7, request) for request in requests)


def test_what_is_due_comes_in_order_and_once(tmp_path: Path, path: Path) -> None:
    journal = Journal(path)
    first, second = ask(tmp_path, "qa", "style")
    journal.append(2, first)
    journal.append(5, second)
    assert [journal.due(step, 0) for step in range(3)] == [[], [], [first]]
    assert [journal.due(step, 1) for step in range(3, 6)] == [[], [], [second]]
    assert journal.due(5, 0) == [first, second], "a checkpoint older than both"
    assert journal.due(9, 2) == []
    assert journal.due(None, 1) == [second], "nothing else is left to do before"


def test_while_a_run_repeats_itself_new_requests_wait(tmp_path: Path, path: Path) -> None:
    """A stop of an adapter that was submitted at step 8 must not come before that, though the run is back at step 3."""
    journal, inbox = Journal(path), Inbox(tmp_path)
    ask(tmp_path, "late")
    journal.take_in(inbox, 8)
    resumed, position, effects = Journal(path), 0, {}
    with inbox.lock():
        inbox.put_stop("late")
    for step in range(3, 11):
        resumed.take_in(inbox, step)
        for request in resumed.due(step, position):
            position += 1
            effects[request.action] = step
        assert (inbox.take() == []) == (step > 8)
    assert effects == {"submit": 8, "stop": 9}
    assert [entry.fused_step for entry in read_journal(path)] == [8, 9]


def test_a_repetition_that_ends_before_the_last_entry_leaves_nothing_out(tmp_path: Path, path: Path) -> None:
    journal, inbox = Journal(path), Inbox(tmp_path)
    submitted = ask(tmp_path, "late")
    journal.take_in(inbox, 8)
    resumed = Journal(path)
    assert resumed.due(5, 0) == []
    assert resumed.due(None, 0) == submitted
    again = ask(tmp_path, "later")
    resumed.take_in(inbox, 5)
    assert [entry.fused_step for entry in read_journal(path)] == [8, 8]
    assert resumed.due(None, 1) == again


@pytest.mark.parametrize("torn", [b"", b'{"fused_step": 9, "id": "a", "act', b"\x00\xff"])
def test_a_torn_last_line_is_cut_by_the_next_entry_and_by_nobody_else(tmp_path: Path, path: Path, torn: bytes) -> None:
    first, second = ask(tmp_path, "qa", "style")
    Journal(path).append(1, first)
    with path.open("ab") as file:
        file.write(torn)
    before = path.read_bytes()
    journal = Journal(path)
    assert journal.entries() == (Entry(1, first),)
    assert path.read_bytes() == before, "a reader changes nothing: it may look while the run writes"
    journal.append(4, second)
    assert read_journal(path) == [Entry(1, first), Entry(4, second)]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "Expecting property name"),
        ("[]", "must be a JSON object"),
        ('{"id": "a", "action": "stop", "adapter": "qa"}', "fused_step=None must be a whole number"),
        ('{"fused_step": true, "id": "a", "action": "stop", "adapter": "qa"}', "fused_step=True"),
        ('{"fused_step": -1, "id": "a", "action": "stop", "adapter": "qa"}', "fused_step=-1"),
        ('{"fused_step": 1, "id": "a", "action": "halt", "adapter": "qa"}', "action='halt'"),
    ],
)
def test_a_whole_line_that_is_no_entry_is_named(tmp_path: Path, path: Path, line: str, reason: str) -> None:
    Journal(path).append(0, ask(tmp_path, "qa")[0])
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=f"{path}, line 2: no entry of a journal: .*{reason}"):
        Journal(path)


def test_a_full_disk_leaves_the_journal_whole_and_the_request_waiting(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inbox, journal = Inbox(tmp_path), Journal(path)
    first, second, third = ask(tmp_path, "qa", "style", "more")
    fsync, syncs = os.fsync, []

    def full_after_two(handle: int) -> None:
        syncs.append(handle)
        if len(syncs) == 4:  # the empty file and its folder, the first line, the second line
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full_after_two)
    journal.take_in(inbox, 5)
    assert read_journal(path) == [Entry(5, first)] == list(journal.entries())
    assert inbox.take() == [second, third]
    assert journal.due(5, 0) == [first]
    journal.take_in(inbox, 6)
    assert read_journal(path) == [Entry(5, first), Entry(6, second), Entry(6, third)]
    assert inbox.take() == []


def test_a_file_that_cannot_be_removed_is_taken_once(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inbox, journal = Inbox(tmp_path), Journal(path)
    (request,) = ask(tmp_path, "qa")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    for step in range(3):
        journal.take_in(inbox, step)
        assert journal.due(step, min(step, 1)) == [request] * (step == 0)
    assert journal.entries() == (Entry(0, request),)


KILLED = """
import os, signal, sys
from moe_peft.training.folder.inbox import Inbox
from moe_peft.training.folder.journal import Journal

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

place, run = sys.argv[1:]
if place == "before the line":
    Journal.append = die
elif place == "between line and removal":
    Inbox.remove = die
elif place == "in the line":
    os.fsync = die
Journal(run + "/journal.jsonl").take_in(Inbox(run), 3)
"""


@pytest.mark.parametrize("place", ["before the line", "in the line", "between line and removal"])
def test_a_kill_at_any_moment_neither_loses_a_request_nor_takes_it_twice(
    tmp_path: Path, path: Path, place: str
) -> None:
    path.touch()
    first, second = ask(tmp_path, "qa", "style")
    done = subprocess.run([sys.executable, "-c", KILLED, place, str(tmp_path)], timeout=100)
    assert done.returncode == -signal.SIGKILL
    inbox, journal = Inbox(tmp_path), Journal(path)
    assert inbox.take() == [first, second], "nothing leaves the inbox before the journal has it"
    written = 0 if place == "before the line" else 1
    assert journal.entries() == (Entry(3, first),) * written
    assert journal.due(3, 0) == [first] * written
    journal.take_in(inbox, 3)
    assert journal.entries() == tuple(read_journal(path)) == (Entry(3, first), Entry(3, second))
    assert inbox.take() == []
