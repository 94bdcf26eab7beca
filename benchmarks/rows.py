"""One measurement, one JSON row: what was measured, on what, with which versions."""

import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def append_row(
    name: str, measured: dict[str, Any], *, folder: Path = RESULTS, device: torch.device | str | None = None
) -> Path:
    """Append a row to ``{name}.jsonl``.

    Args:
        name: of the benchmark.
        measured: its settings and figures. ``case`` tells its rows apart: of the rows of one case, the last counts.
        folder: where the file lies.
        device: it was measured on; None: the GPU where there is one.

    Returns:
        The file.
    """
    path = folder / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**environment(device), **measured}) + "\n")
    return path


def read_rows(folder: Path = RESULTS) -> dict[str, list[dict[str, Any]]]:
    """The newest row of every case on every device, of every benchmark in a folder."""
    newest = {}
    for path in sorted(folder.glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        newest[path.stem] = list({(row["device"], row.get("case")): row for row in rows}.values())
    return newest


def environment(device: torch.device | str | None = None) -> dict[str, Any]:
    """Commit, device, threads and versions."""
    on_gpu = torch.cuda.is_available() if device is None else torch.device(device).type == "cuda"
    packages = ("numpy", "triton") if on_gpu else ("numpy",)
    # Rows measured a moment ago are no change of what is measured.
    changed = _git("status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results")
    return {
        "commit": _git("rev-parse", "--short", "HEAD") + ("+" if changed else ""),
        "device": torch.cuda.get_device_name() if on_gpu else _cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{package: metadata.version(package) for package in packages},
        },
    }


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
