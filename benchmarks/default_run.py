"""How long ``python -m moe_peft.train`` takes with no config, and how far its held-out losses fall.

    python benchmarks/default_run.py [--results FOLDER] [key=value ...]

The model must be in the cache already: the download is not part of the measurement.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rows import RESULTS, append_row

from moe_peft.io.source import resolve_source


def main(arguments: list[str]) -> None:
    """Run it in a process of its own, print what it prints, and append a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the row goes")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the default config")
    options = parser.parse_args(arguments)
    overrides: list[str] = options.overrides
    resolve_source("smollm2-135m")
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "moe_peft.train", f"output_dir={run}", *overrides], check=True)
        seconds = time.perf_counter() - start
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evals: dict[str, list[float]] = {}
    for row in rows:
        if row["event"] == "eval":
            evals.setdefault(row["adapter"], []).append(row["eval_loss"])
    steps = [row for row in rows if row["event"] == "step"]
    measured = {
        "overrides": overrides,
        "seconds": round(seconds, 1),
        "trained_tokens": sum(row["num_tokens"] for row in steps),
        "steps": len(steps),
        "held_out_loss": {name: [round(losses[0], 4), round(losses[-1], 4)] for name, losses in evals.items()},
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9, 2),
    }
    print(json.dumps(measured, indent=2))
    print(f"row appended to {append_row('default_run', measured, folder=options.results)}")


if __name__ == "__main__":
    main(sys.argv[1:])
