"""How much memory a device has left, and how much of the machine's this process holds."""

import os
from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")


def held_bytes() -> int:
    """Memory of this process that no file stands behind; 0 where the system does not tell."""
    return _field(Path("/proc/self/status"), "RssAnon:")


def available_bytes(device: torch.device) -> int | None:
    """What a new process could take on a device, this one's share counted in, as it will have ended; None: unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory())
    free = _field(Path("/proc/meminfo"), "MemAvailable:")
    if free:
        return min([free, *_cgroup_room()]) + held_bytes()
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None


def _cgroup_room() -> list[int]:
    """What a container's limit leaves."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        cached = _field(_CGROUP / "memory.stat", "inactive_file", unit=1)
    except (OSError, ValueError):
        return []
    return [max(0, int(limit) - used + cached)] if limit.isdigit() else []


def _field(path: Path, name: str, unit: int = 1024) -> int:
    """A number out of lines such as ``RssAnon:   1234 kB``; 0 where there is none."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * unit for line in lines if line.split()[:1] == [name]), 0)
