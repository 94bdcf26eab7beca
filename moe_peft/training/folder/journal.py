"""The journal of a run: every request from outside with the fused step at which it took effect."""

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from moe_peft.io.atomic import write_bytes_atomically
from moe_peft.strict import show
from moe_peft.training.folder.inbox import Inbox, Request

FILE = "journal.jsonl"


@dataclass(frozen=True)
class Entry:
    """A request, and the fused step before which it takes effect, now and whenever the run is repeated from a
    checkpoint."""

    fused_step: int
    request: Request


class Journal:
    """The journal of the process that trains. Between two fused steps it does this, live and in a replay alike::

        journal.take_in(inbox, fused_step)
        for request in journal.due(fused_step, position):
            position += 1  # a checkpoint holds it
            ...            # take effect

    and where nothing is left to train it asks for the rest, ``due(None, position)``.

    Args:
        path: ``journal.jsonl`` of the run's folder; made with its first entry.

    Raises:
        ValueError: as :func:`read_journal`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._entries = read_journal(self.path)
        self._ids = {entry.request.id for entry in self._entries}
        self._num_due = 0  # entries that have been given out

    def entries(self) -> tuple[Entry, ...]:
        """All there are, in the order in which they take effect."""
        return tuple(self._entries)

    def take_in(self, inbox: Inbox, fused_step: int) -> None:
        """Write down the requests that wait, then clear them out of the inbox: one is never lost and never taken twice.

        While a run repeats what it did before a crash, new requests wait until the journal's last entry has been due:
        they were made by somebody who had seen its effect. A disk that takes no line leaves them waiting, too.
        """
        if self._num_due < len(self._entries):
            return
        # Larger than the run's own only where the repetition, on another machine say, ended sooner.
        fused_step = max([fused_step, *(entry.fused_step for entry in self._entries[-1:])])
        for request in inbox.take():
            if request.id not in self._ids:  # else the process was killed between the two
                try:
                    self.append(fused_step, request)
                except OSError:
                    return
            inbox.remove(request)

    def append(self, fused_step: int, request: Request) -> None:
        """Add one entry; it is on the disk when this returns.

        Raises:
            OSError: it could not be written; the journal is as it was.
        """
        assert not self._entries or fused_step >= self._entries[-1].fused_step, "a journal goes forward only"
        line = json.dumps({"fused_step": fused_step, **request.to_dict()}, ensure_ascii=False) + "\n"
        if not self.path.exists():
            write_bytes_atomically(self.path, b"")  # which makes the name last, too
        with self.path.open("rb+", buffering=0) as file:
            end = file.read().rfind(b"\n") + 1  # cuts a last line that a killed process left torn
            file.truncate(end)
            file.seek(end)
            try:
                data = memoryview(line.encode("utf-8"))
                while data:
                    data = data[file.write(data) :]
                os.fsync(file.fileno())
            except BaseException:
                with contextlib.suppress(OSError):
                    file.truncate(end)
                raise
        self._entries.append(Entry(fused_step, request))
        self._ids.add(request.id)

    def due(self, fused_step: int | None, position: int) -> list[Request]:
        """The requests that take effect now.

        Args:
            fused_step: the one about to be taken; None: all the rest, for a run that has nothing left to do before.
            position: how many entries have taken effect already.
        """
        rest = self._entries[position:]
        found = [entry.request for entry in rest if fused_step is None or entry.fused_step <= fused_step]
        self._num_due = position + len(found)
        return found


def read_journal(path: str | Path) -> list[Entry]:
    """The entries of a journal, which may not exist yet; a torn last line is left out.

    Raises:
        ValueError: on a complete line that is no entry, with file and line.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    entries = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("it must be a JSON object")
            step = row.pop("fused_step", None)
            if not isinstance(step, int) or isinstance(step, bool) or step < 0:
                raise ValueError(f"fused_step={show(step)} must be a whole number from 0 on")
            entries.append(Entry(step, Request.from_dict(row)))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: no entry of a journal: {error}") from None
    return entries
