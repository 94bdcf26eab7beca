"""Requests reach a run whole, in order and once; whatever else lies in its inbox does no harm."""

import errno
import json
import os
import threading
import time
from pathlib import Path

import pytest
from run_maker import new_job, put_stops

from moe_peft.training.folder import inbox as inbox_module
from moe_peft.training.folder.inbox import Inbox, Request


def plant(run: Path, content: str | bytes, name: str = f"{7:020d}-{0:08x}.json") -> Path:
    """A file in the inbox that no command of ours has written."""
    path = run / "inbox" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_what_is_put_in_comes_out_equal_and_stays_until_removed(tmp_path: Path) -> None:
    inbox = Inbox(tmp_path)
    assert inbox.take() == []
    assert not inbox.folder.exists(), "looking makes nothing"
    mixture = new_job("mix", method="mixlora", num_experts=4, lr=3e-5, betas=[0.8, 0.95], seed=2**60)
    with inbox.lock():
        put_in = [inbox.put_job(new_job("qa")), inbox.put_job(mixture), inbox.put_stop("qa")]
    assert inbox.take() == inbox.take() == put_in
    assert [request.action for request in put_in] == ["submit", "submit", "stop"]
    assert [request.adapter for request in put_in] == ["qa", "mix", "qa"]
    assert put_in[1].job == mixture
    inbox.remove(put_in[1])
    inbox.remove(put_in[1])
    assert Inbox(tmp_path).take() == [put_in[0], put_in[2]]


def test_a_job_file_says_everything_and_its_version(tmp_path: Path) -> None:
    inbox = Inbox(tmp_path)
    with inbox.lock():
        request = inbox.put_job(new_job("qa"))
    content = json.loads((tmp_path / "inbox" / f"{request.id}.json").read_text())
    assert content == {"version": 1, "action": "submit", "job": new_job("qa").to_dict()}


def test_the_order_is_that_of_asking_even_if_the_clock_goes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([5000, 5000, 3, 10**19])
    monkeypatch.setattr(time, "time_ns", lambda: next(clock))
    put_stops(tmp_path, "a", "b", "c", "d")
    assert [request.adapter for request in Inbox(tmp_path).take()] == ["a", "b", "c", "d"]


def test_many_at_once_lose_nothing_and_take_nothing_twice(tmp_path: Path) -> None:
    def ask(who: int) -> None:
        for number in range(20):
            put_stops(tmp_path, f"{who}-{number}")

    threads = [threading.Thread(target=ask, args=(who,)) for who in range(4)]
    for thread in threads:
        thread.start()
    inbox, taken = Inbox(tmp_path), []
    while any(thread.is_alive() for thread in threads) or inbox.take():
        for request in inbox.take():
            assert request.error is None, "a file is there whole or not at all"
            taken.append(request)
            inbox.remove(request)
    assert len(taken) == len({request.id for request in taken}) == 80
    for who in range(4):
        mine = [request.adapter for request in taken if request.adapter.startswith(f"{who}-")]
        assert mine == [f"{who}-{number}" for number in range(20)]


@pytest.mark.parametrize(
    ("content", "adapter", "reason"),
    [
        ("", None, "Expecting value"),
        ('{"version": 1, "action": "st', None, "Unterminated string"),
        ("[1, 2]", None, "must hold a JSON object"),
        (b"\xff\xfe\x00", None, "can't decode"),
        ("[" * 100_000, None, "nested too deeply"),
        ('{"action": "stop", "adapter": "qa"}', "qa", "version=None must be 1"),
        ('{"version": 2, "action": "stop", "adapter": "qa"}', "qa", "version=2 must be 1"),
        ('{"version": 1, "action": "jump", "adapter": "qa"}', "qa", "action='jump' must be one of submit, stop"),
        ('{"version": 1, "action": ["stop"], "adapter": "qa"}', "qa", r"action=\['stop'\] must be one of"),
        ('{"version": 1, "action": "stop"}', None, "adapter is missing: action='stop' needs it"),
        ('{"version": 1, "action": "stop", "adapter": 3}', None, "adapter=3 must be a string"),
        ('{"version": 1, "action": "stop", "adapter": "a\\nb"}', None, "adapter='a.*nb' must be 1 to 100 letters"),
        ('{"version": 1, "action": "stop", "adapter": "qa", "job": {}}', None, "job={} does not go with action='stop'"),
        ('{"version": 1, "action": "stop", "adapter": "qa", "when": "now"}', "qa", "when='now' is not a known key"),
        ('{"version": 1, "action": "submit", "job": "qa"}', None, "job='qa' must be a mapping"),
        ('{"version": 1, "action": "submit", "job": {"name": "qa", "method": "lroa"}}', "qa", "did you mean 'lora'"),
        ('{"version": 1, "action": "submit", "job": {"name": "qa", "method": "lora"}}', "qa", "job.data is missing"),
        (
            '{"version": 1, "action": "submit", "job": {"name": "../x", "method": "lora", "data": "d"}}',
            None,
            r"name='\.\./x'",
        ),
        (b" " * (2 << 20), None, "larger than 1,048,576 bytes"),
    ],
)
def test_a_file_that_is_no_request_says_so_and_can_be_removed(
    tmp_path: Path, content: str | bytes, adapter: str | None, reason: str
) -> None:
    path = plant(tmp_path, content)
    inbox = Inbox(tmp_path)
    (request,) = inbox.take()
    assert request.action == "refuse"
    assert request.job is None
    assert request.adapter == (adapter or path.stem)
    with pytest.raises(ValueError, match=reason):
        raise ValueError(request.error)
    assert request.error is not None
    assert request.error.startswith(f"the request {path.name} cannot be read: ")
    assert Request.from_dict(request.to_dict()) == request, "the journal can hold it"
    inbox.remove(request)
    assert inbox.take() == []


def test_a_bad_file_does_not_hide_the_good_ones(tmp_path: Path) -> None:
    (good,) = put_stops(tmp_path, "qa")
    plant(tmp_path, "{")
    assert [(request.adapter, request.error is None) for request in Inbox(tmp_path).take()][1:] == [("qa", True)]
    assert Inbox(tmp_path).take()[1] == good


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    name = f"{7:020d}-{0:08x}.json"
    inbox = Inbox(tmp_path)
    inbox.folder.mkdir()
    for stranger in ("notes.txt", "mine.yaml", f".{name}.abc.partial", f"{name}.bak"):
        (inbox.folder / stranger).write_text("{}")
    os.mkfifo(inbox.folder / name)  # opening it would wait for ever
    (inbox.folder / name.replace("7-", "8-")).symlink_to("/dev/zero")
    (inbox.folder / name.replace("7-", "9-")).mkdir()
    before = sorted(inbox.folder.iterdir())
    assert inbox.take() == []
    assert sorted(inbox.folder.iterdir()) == before


def test_a_file_that_vanishes_or_cannot_be_opened_is_no_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(tmp_path, "{}")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    (request,) = Inbox(tmp_path).take()
    assert request.error is not None
    assert "Permission denied" in request.error


def test_it_closes_only_when_nothing_waits(tmp_path: Path) -> None:
    inbox = Inbox(tmp_path)
    (request,) = put_stops(tmp_path, "qa")
    assert not inbox.close()
    assert not inbox.is_closed
    inbox.remove(request)
    assert inbox.close()
    assert Inbox(tmp_path).is_closed
    assert inbox.take() == []


def test_a_run_without_a_request_can_close_its_inbox(tmp_path: Path) -> None:
    assert Inbox(tmp_path).close()
    assert Inbox(tmp_path).is_closed


def test_whoever_keeps_the_lock_is_not_waited_for_endlessly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox_module, "_PATIENCE", 0.1)
    with (
        Inbox(tmp_path).lock(),
        pytest.raises(ValueError, match=f"putting requests into {tmp_path / 'inbox'}"),
        Inbox(tmp_path).lock(),
    ):
        pytest.fail("two held one lock")


def test_looking_into_an_empty_inbox_is_one_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_stops(tmp_path, "qa")
    inbox = Inbox(tmp_path)
    inbox.remove(inbox.take()[0])
    looks = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: looks.append(path) or scandir(path))
    monkeypatch.setattr(Path, "open", lambda *_: pytest.fail("nothing is opened"))
    assert inbox.take() == []
    assert looks == [inbox.folder]
