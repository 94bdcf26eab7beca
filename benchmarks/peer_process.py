"""A peer's environment, and the process in it that takes a training step when asked."""

import contextlib
import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

# What pip installs for each peer, one command an entry. The pins matter: a bare torch pulls gigabytes of CUDA.
_CONSTRAINTS = ("-c", str(ROOT / "constraints.txt"))
INSTALLS: dict[str, list[tuple[str, ...]]] = {
    "peft": [(*_CONSTRAINTS, "torch", "transformers", "peft", "accelerate")],
    "original": [
        (
            "torch==2.13.0",
            "transformers==4.45.2",
            "datasets==5.0.1",
            "evaluate==0.4.6",
            "accelerate==1.15.0",
            "sentencepiece==0.2.3",
        ),
        ("--no-deps", "moe-peft==2.0.2"),  # it asks for an older torch, which it does not need
    ],
}


def peer_python(peer: str, cache: Path) -> str:
    """The interpreter of a peer's own environment, which is made under the cache folder if it is not there yet."""
    folder = cache / f"venv-{peer}"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = folder / "installed.json"
    wanted = json.dumps([INSTALLS[peer], (ROOT / "constraints.txt").read_text(encoding="utf-8")])
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return str(python)
    print(f"making the environment {folder}: {INSTALLS[peer]}", flush=True)
    venv.create(folder, with_pip=True, clear=True)
    for install in INSTALLS[peer]:
        subprocess.run([python, "-m", "pip", "install", "--quiet", *install], check=True, env=_environment(peer, {}))
    stamp.write_text(wanted, encoding="utf-8")
    return str(python)


def installed_versions(python: str, packages: tuple[str, ...]) -> dict[str, str]:
    """Versions in another environment; none of a package that it lacks."""
    code = (
        "import json, sys; from importlib import metadata\n"
        "found = {d.metadata['Name'].lower(): d.version for d in metadata.distributions()}\n"
        "print(json.dumps({name: found[name] for name in sys.argv[1:] if name in found}))"
    )
    done = subprocess.run(
        [python, "-c", code, *packages], check=True, stdout=subprocess.PIPE, text=True, env=_environment("peft", {})
    )
    versions: dict[str, str] = json.loads(done.stdout)
    return versions


def _environment(peer: str, extra: dict[str, str]) -> dict[str, str]:
    """This process' variables; a peer is not shown where ours lies."""
    variables = {**os.environ, **extra}
    if peer != "ours":
        variables.pop("PYTHONPATH", None)
    return variables


class Worker:
    """A process that trains, a step when asked; between two steps it sleeps.

    Args:
        peer: ``ours``, ``peft`` or ``original``.
        python: the interpreter.
        settings: see the workers.
        log: takes what it prints.

    Raises:
        RuntimeError: when it dies, with the end of what it printed.
    """

    def __init__(self, peer: str, python: str, settings: dict[str, Any], log: Path) -> None:
        self._log = log
        self.losses: list[list[float]] = []
        self.peak_memory_gb = 0.0
        self._script = Path(__file__).parent / f"worker_{peer}.py"
        threads = {"OMP_NUM_THREADS": str(settings["num_threads"])}
        with log.open("w", encoding="utf-8") as errors:
            self._process = subprocess.Popen(
                [python, str(self._script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=_environment(peer, threads),
            )
        self.environment = self._ask(json.dumps(settings))

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
            reply = self._process.stdout.readline()
        except BrokenPipeError:
            reply = ""
        if not reply:
            self.close()
            end = "\n".join(self._log.read_text(encoding="utf-8").splitlines()[-20:])
            raise RuntimeError(f"{self._script} ended with {self._process.returncode}:\n{end}")
        answer: dict[str, Any] = json.loads(reply)
        return answer

    def __call__(self, number: int) -> float:
        """Take the step of that number; returns its seconds."""
        reply = self._ask(str(number))
        self.losses.append(reply["losses"])
        self.peak_memory_gb = reply["peak_memory_gb"]
        return float(reply["seconds"])

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


OUR_PYTHON = sys.executable
