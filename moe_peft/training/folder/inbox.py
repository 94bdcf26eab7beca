"""The inbox of a run: requests of other processes, one file each."""

import contextlib
import json
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moe_peft.config import AdapterJob
from moe_peft.config.job import ADAPTER_NAME
from moe_peft.io.atomic import write_text_atomically
from moe_peft.strict import check_keys, show
from moe_peft.training.folder.run_lock import try_lock

FOLDER = "inbox"
VERSION = 1  # of the files
# Nanoseconds since 1970, so that the names sort as the requests were made, and what makes two of one moment differ.
_NAME = re.compile(r"(\d{20})-[0-9a-f]{8}\.json")
_LOCK, _CLOSED = ".lock", "closed"
_MAX_BYTES = 1 << 20
_PATIENCE, _PAUSE = 10.0, 0.02


@dataclass(frozen=True, kw_only=True)
class Request:
    """What somebody asks of a run.

    Args:
        id: never the same for two requests of a run; sorts as they were made.
        action: ``submit``, ``stop``, or ``refuse`` where it can be neither.
        adapter: the adapter to take in or to stop; of a file that names none, the file's id.
        job: what to train; None where nothing is submitted.
        error: why the request cannot be followed; None where it can.
    """

    id: str
    action: Literal["submit", "stop", "refuse"]
    adapter: str
    job: AdapterJob | None = None
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The request as plain data that :meth:`from_dict` reads back."""
        if self.job is not None:
            return {"id": self.id, "action": self.action, "job": self.job.to_dict()}
        error = {} if self.error is None else {"error": self.error}
        return {"id": self.id, "action": self.action, "adapter": self.adapter, **error}

    @classmethod
    def from_dict(cls, mapping: object) -> "Request":
        """Reads what :meth:`to_dict` wrote.

        Raises:
            ValueError: naming the key, its value and its rule.
        """
        values = check_keys(mapping, ("id", "action", "adapter", "job", "error"), "")
        action = values.get("action")
        needed = {"submit": ("id", "job"), "stop": ("id", "adapter"), "refuse": ("id", "adapter", "error")}
        if not isinstance(action, str) or action not in needed:
            raise ValueError(f"action={show(action)} must be one of {', '.join(needed)}")
        for key in values:
            if key not in (*needed[action], "action"):
                raise ValueError(f"{key}={show(values[key])} does not go with action={action!r}")
        for key in needed[action]:
            if key not in values:
                raise ValueError(f"{key} is missing: action={action!r} needs it")
            if key != "job" and not isinstance(values[key], str):
                raise ValueError(f"{key}={show(values[key])} must be a string")
            if key == "adapter" and not ADAPTER_NAME.fullmatch(values[key]):
                raise ValueError(f"adapter={show(values[key])} must be 1 to 100 letters, digits, _ or -")
        if action == "submit":
            job = AdapterJob.from_dict(_mapping(values["job"]), "job")
            return cls(id=values["id"], action="submit", adapter=job.name, job=job)
        return cls(**values)


def _mapping(value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"job={show(value)} must be a mapping of keys to values")
    return value


class Inbox:
    """A run's inbox. Others put requests in; the trainer takes them out between two fused steps.

    Args:
        run_folder: of the run; the inbox itself is made with its first request.
    """

    def __init__(self, run_folder: str | Path) -> None:
        self.folder = Path(run_folder) / FOLDER

    def take(self) -> list[Request]:
        """The requests that wait, oldest first; each stays until :meth:`remove`.

        One look into the folder where there are none. A file that is no valid request comes back with its ``error``;
        what is not named as ``submit`` and ``stop`` name their files is somebody else's and is left alone.
        """
        return [self._read(name) for name in self._names()]

    def remove(self, request: Request) -> None:
        """Remove a request's file; one that is gone, or cannot be removed, is no error."""
        with contextlib.suppress(OSError):
            (self.folder / f"{request.id}.json").unlink()

    def close(self) -> bool:
        """Close the inbox at the end of a run, so that no request is left in it for nobody.

        Returns:
            False when requests wait still; it then stays open.
        """
        if not self.folder.is_dir():
            self.folder.mkdir(parents=True, exist_ok=True)
        with self.lock():
            if self._names():
                return False
            (self.folder / _CLOSED).touch()
            return True

    @property
    def is_closed(self) -> bool:
        """Whether the run is complete."""
        return (self.folder / _CLOSED).exists()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held by whoever looks at what there is and puts in a request by it, and by nobody else meanwhile.

        Raises:
            ValueError: when another process keeps it for long.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            deadline = time.monotonic() + _PATIENCE
            while not try_lock(handle):
                if time.monotonic() > deadline:
                    raise ValueError(
                        f"another process has been putting requests into {self.folder} for long; try again"
                    )
                time.sleep(_PAUSE)
            yield
        finally:
            os.close(handle)

    def put_job(self, job: AdapterJob) -> Request:
        """Ask the run to train one more adapter; for use inside :meth:`lock`."""
        return self._put(action="submit", adapter=job.name, job=job)

    def put_stop(self, adapter: str) -> Request:
        """Ask the run to stop an adapter; for use inside :meth:`lock`."""
        return self._put(action="stop", adapter=adapter)

    def _put(self, **fields: Any) -> Request:
        # Behind those that wait, even if the clock was set back.
        newest = max((int(name[:20]) for name in self._names()), default=0)
        request = Request(id=f"{max(time.time_ns(), newest + 1):020d}-{secrets.token_hex(4)}", **fields)
        content = request.to_dict()
        del content["id"]  # the file's name says it
        text = json.dumps({"version": VERSION, **content}, ensure_ascii=False, indent=1)
        write_text_atomically(self.folder / f"{request.id}.json", text + "\n")
        return request

    def _names(self) -> list[str]:
        try:
            with os.scandir(self.folder) as entries:
                # No pipe, no device, no link: opening one could block the run for ever.
                found = [e.name for e in entries if _NAME.fullmatch(e.name) and e.is_file(follow_symlinks=False)]
        except OSError:  # there is no inbox yet
            return []
        return sorted(found)

    def _read(self, name: str) -> Request:
        request_id = name.removesuffix(".json")
        named = request_id
        try:
            with (self.folder / name).open("rb") as file:
                data = file.read(_MAX_BYTES + 1)
            if len(data) > _MAX_BYTES:
                raise ValueError(f"it is larger than {_MAX_BYTES:,} bytes")
            content = json.loads(data)
            if not isinstance(content, dict):
                raise ValueError("it must hold a JSON object")
            named = _adapter_named(content) or request_id
            if content.get("version") != VERSION:
                raise ValueError(f"version={show(content.get('version'))} must be {VERSION}")
            del content["version"]
            return Request.from_dict({**content, "id": request_id})
        except (OSError, ValueError, RecursionError) as error:
            why = "it is nested too deeply" if isinstance(error, RecursionError) else error
            reason = f"the request {name} cannot be read: {why}"
            return Request(id=request_id, action="refuse", adapter=named, error=reason)


def _adapter_named(content: Mapping[str, Any]) -> str | None:
    """The adapter that a request is about, however wrong the rest of it is."""
    job = content.get("job")
    name = job.get("name") if isinstance(job, dict) else content.get("adapter")
    return name if isinstance(name, str) and ADAPTER_NAME.fullmatch(name) else None
