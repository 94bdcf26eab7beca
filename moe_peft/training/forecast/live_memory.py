"""Follows what torch has allocated on a device while something runs: at marks, and at most between them."""

import gc
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_START, _END = "start", "end"


class LiveMemory:
    """Bytes beyond those at the start; see ``follow``.

    Args:
        device: whose.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str, int]] = []  # name and time, on a CPU
        self._windows: list[tuple[str, int, int]] = []  # name, bytes at the mark, peak since the one before

    def mark(self, name: str) -> None:
        """Remember this moment."""
        if self._device.type == "cpu":
            self._marks.append((name, time.time_ns()))
        elif self._device.type == "cuda":
            # The allocator counts as memory is handed out, which is before the device uses it: no need to wait.
            live = torch.cuda.memory_allocated(self._device)
            self._windows.append((name, live, torch.cuda.max_memory_allocated(self._device)))
            torch.cuda.reset_peak_memory_stats(self._device)
        else:  # a device that tells of no peak
            live = torch.mps.current_allocated_memory() if self._device.type == "mps" else 0
            self._windows.append((name, live, live))

    def at(self, name: str) -> int:
        """Bytes at a mark."""
        return next(live for mark, live, _ in self._windows if mark == name) - self._windows[0][1]

    def peak(self, first: str = _START, last: str = _END) -> int:
        """The most bytes between two marks."""
        names = [mark for mark, _, _ in self._windows]
        between = self._windows[names.index(first) : names.index(last) + 1]
        return max([between[0][1], *(peak for _, _, peak in between[1:])]) - self._windows[0][1]

    def has(self, name: str) -> bool:
        """Whether there was such a mark."""
        return any(mark == name for mark, _, _ in self._windows)

    def _take_in(self, events: list[tuple[int, int]]) -> None:
        """Windows out of a CPU's allocations: time and bytes of each."""
        events, live, i = sorted(events), 0, 0
        for name, moment in self._marks:
            peak = live
            while i < len(events) and events[i][0] <= moment:
                live += events[i][1]
                peak = max(peak, live)
                i += 1
            self._windows.append((name, live, peak))


@contextmanager
def follow(device: torch.device) -> Iterator[LiveMemory]:
    """Within it marks are set; afterwards they can be asked for.

    On a CPU torch's profiler tells of every allocation; what oneDNN takes for itself is not among them.
    """
    memory = LiveMemory(device)
    if device.type != "cpu":
        memory.mark(_START)
        yield memory
        memory.mark(_END)
        return
    gc.collect()  # here, and not within: the profiler warns of memory that it has not seen taken
    with _silent_profiler(), torch.autograd.profiler.profile(use_kineto=False, profile_memory=True) as profiler:
        collects = gc.isenabled()
        gc.disable()
        try:
            memory.mark(_START)
            yield memory
            memory.mark(_END)
        finally:
            if collects:
                gc.enable()
    events = profiler.kineto_results.events()
    memory._take_in([(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"])


@contextmanager
def _silent_profiler() -> Iterator[None]:
    """Its library reports on stderr that it starts and stops, unless this variable says otherwise the first time."""
    before = os.environ.get("KINETO_LOG_LEVEL")
    os.environ["KINETO_LOG_LEVEL"] = "99"
    try:
        yield
    finally:
        if before is None:
            del os.environ["KINETO_LOG_LEVEL"]
        else:
            os.environ["KINETO_LOG_LEVEL"] = before
