"""How much memory loading a base model takes at its peak, watched from outside the process."""

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

_LOADER = textwrap.dedent("""
    import sys
    import moe_peft
    print("ready", flush=True)
    sys.stdin.readline()
    model = moe_peft.load_base_model(sys.argv[1], dtype=sys.argv[2], device="cpu")
    print("loaded", flush=True)
    sys.stdin.readline()
""")


def peak_of_loading(source: Path, dtype: str) -> int:
    """Bytes of anonymous memory beyond what importing the package takes; Linux only."""
    command = [sys.executable, "-c", _LOADER, str(source), dtype]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        before = peak = _anonymous_bytes(process.pid)
        process.stdin.write("\n")
        process.stdin.flush()
        os.set_blocking(process.stdout.fileno(), False)
        while not process.stdout.readline():  # from outside, no lock in there can hide a peak
            peak = max(peak, _anonymous_bytes(process.pid))
            assert process.poll() is None
            time.sleep(0.001)
        peak = max(peak, _anonymous_bytes(process.pid))
        process.communicate("\n")
    return peak - before


def _anonymous_bytes(process_id: int) -> int:
    for line in Path(f"/proc/{process_id}/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) << 10
    return 0
