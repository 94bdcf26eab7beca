"""The lock on a run's folder, so that two processes never train in one."""

import json
import os
import platform
import time
from pathlib import Path
from types import TracebackType

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there, and a run's folder is only as safe as its user is careful
    fcntl = None  # type: ignore[assignment]

FILE = "run.lock"
# A probe (is_locked) holds the lock for a moment: the process that wants to train tries again for this long.
PATIENCE, PAUSE = 1.0, 0.05


def try_lock(handle: int, *, shared: bool = False) -> bool:
    """Lock an open file without waiting; the lock ends with the handle, however its process ends.

    Returns:
        False when another process holds it. True, too, where the system or the file system has no locks.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems
        return True
    return True


class RunLock:
    """What the process that trains a run's folder holds from its first write there to its last.

    Args:
        folder: of the run; it must exist.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / FILE
        self._handle: int | None = None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            ValueError: another process holds it; names the folder and the process.
        """
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        deadline = time.monotonic() + PATIENCE
        while not try_lock(handle):
            if time.monotonic() > deadline:
                os.close(handle)
                raise ValueError(
                    f"the run folder {self.path.parent} is being trained by {_holder(self.path)}: two processes never "
                    "share a folder; wait for it, interrupt it, or give output_dir another name"
                )
            time.sleep(PAUSE)
        self._handle = handle
        os.ftruncate(handle, 0)
        os.write(handle, json.dumps({"pid": os.getpid(), "host": platform.node()}).encode() + b"\n")

    def release(self) -> None:
        """Give the lock back; the file stays. Giving it back twice is harmless."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def __enter__(self) -> "RunLock":
        self.acquire()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


def is_locked(folder: str | Path) -> bool:
    """Whether a process trains this folder now."""
    try:
        handle = os.open(Path(folder) / FILE, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not try_lock(handle, shared=True)
    finally:
        os.close(handle)


def holder(folder: str | Path) -> str | None:
    """The process that trains this folder now, such as ``process 1234``; None when there is none."""
    return _holder(Path(folder) / FILE) if is_locked(folder) else None


def _holder(path: Path) -> str:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        pid, host = int(known["pid"]), str(known["host"])
    except (OSError, ValueError, KeyError, TypeError):  # between its lock and its first line, say
        return "another process"
    return f"process {pid}" + ("" if host == platform.node() else f" on {host}")
