"""The folder a run leaves behind: config, metrics, pictures, adapters."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np

from moe_peft.config import TrainConfig
from moe_peft.io.adapter_files import save_adapter
from moe_peft.io.atomic import write_text_atomically
from moe_peft.model.llama import LlamaForCausalLM
from moe_peft.training.adapter_run import AdapterRun

DEFAULT_PARENT = Path("runs")


def check_output_dir(output_dir: str | None) -> None:
    """Refuse a folder that holds something already, before any work is spent.

    Raises:
        ValueError: naming the folder.
    """
    path = DEFAULT_PARENT if output_dir is None else Path(output_dir).expanduser()
    for part in (path, *path.parents):
        if part.exists() and not part.is_dir():
            raise ValueError(f"output_dir={output_dir!r} must be a folder, but {part} is a file")
    if output_dir is not None and path.is_dir() and any(path.iterdir()):
        raise ValueError(f"output_dir={output_dir!r} must be new or empty: nothing of an earlier run is overwritten")


class RunFolder:
    """Makes the folder and knows the place of everything in it.

    Args:
        config: of the run; it is saved with the folder's own name in it.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.path = self._make(config.output_dir)
        self.saved: dict[str, Path] = {}  # adapter name to its folder
        resolved = dataclasses.replace(config, output_dir=str(self.path))
        write_text_atomically(self.path / "config.yaml", resolved.to_yaml())

    @staticmethod
    def _make(output_dir: str | None) -> Path:
        if output_dir is not None:
            check_output_dir(output_dir)
            path = Path(output_dir).expanduser()
            path.mkdir(parents=True, exist_ok=True)
            return path
        DEFAULT_PARENT.mkdir(exist_ok=True)
        for number in itertools.count(1):
            path = DEFAULT_PARENT / f"run-{number:03d}"
            try:
                path.mkdir()  # fails where another run was faster
            except FileExistsError:
                continue
            return path
        raise AssertionError("unreachable: itertools.count does not end")

    @property
    def metrics(self) -> Path:
        """One JSON object a line for every step and evaluation."""
        return self.path / "metrics.jsonl"

    def adapter(self, name: str) -> Path:
        """The folder of one adapter."""
        return self.path / "adapters" / name

    def save(self, model: LlamaForCausalLM, run: AdapterRun) -> None:
        """Write an adapter's current weights, or its last good ones."""
        run.settle()
        path = self.adapter(run.job.name)
        save_adapter(model, run.job.name, path)
        self.saved[run.job.name] = path

    def draw(self, runs: list[AdapterRun]) -> None:
        """Draw the loss curves, and for routed adapters the load of every expert over the whole training."""
        from moe_peft.training.plots import plot_expert_load, plot_loss_curves

        plot_loss_curves(self.metrics, self.path / "loss.png")
        for run in runs:
            if run.expert_counts is not None:
                counts = run.expert_counts.cpu().numpy().astype(np.float64)
                load = counts / counts.sum(axis=1, keepdims=True)
                plot_expert_load(load, self.path / f"expert_load_{run.job.name}.png", run.job.name)
