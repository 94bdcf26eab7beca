"""The most memory that this process has held."""

import resource
import sys
from pathlib import Path


def peak_memory_gb() -> float:
    """Its high-water mark of resident memory, in 10^9 bytes.

    ``ru_maxrss`` would begin at what the parent held when it started this process; Linux's own mark begins at zero.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
