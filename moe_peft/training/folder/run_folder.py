"""The folder a run leaves behind: config, metrics, pictures, adapters."""

import dataclasses
import itertools
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from moe_peft.config import TrainConfig
from moe_peft.io.adapter_files import save_adapter
from moe_peft.io.atomic import write_text_atomically
from moe_peft.model.llama import LlamaForCausalLM
from moe_peft.training.display.expert_load import load_shares
from moe_peft.training.folder.checkpoints import Checkpoints
from moe_peft.training.folder.run_lock import FILE as LOCK_FILE
from moe_peft.training.folder.run_lock import RunLock

DEFAULT_PARENT = Path("runs")
CONFIG_FILE = "config.yaml"
ADAPTERS = "adapters"


def is_occupied(path: Path) -> bool:
    """Whether a folder holds anything but what a run killed at its very beginning leaves."""
    return path.is_dir() and any(
        entry.name != LOCK_FILE and not entry.name.startswith(f".{CONFIG_FILE}.") for entry in path.iterdir()
    )


def check_output_dir(output_dir: str | None) -> None:
    """Refuse a folder that holds something already, before any work is spent.

    Raises:
        ValueError: naming the folder.
    """
    path = DEFAULT_PARENT if output_dir is None else Path(output_dir).expanduser()
    for part in (path, *path.parents):
        if part.exists() and not part.is_dir():
            raise ValueError(f"output_dir={output_dir!r} must be a folder, but {part} is a file")
    if output_dir is not None and is_occupied(path):
        raise ValueError(f"output_dir={output_dir!r} must be new or empty: nothing of an earlier run is overwritten")


class RunFolder:
    """Makes the folder, keeps other processes out of it, and knows the place of everything in it.

    Args:
        config: of the run; it is saved with the folder's own name in it.
        is_resumed: whether the folder is that of an earlier run, which goes on.

    Raises:
        ValueError: when the folder is occupied, or another process trains in it.
    """

    def __init__(self, config: TrainConfig, *, is_resumed: bool = False) -> None:
        self.path = Path(str(config.output_dir)).expanduser() if is_resumed else self._make(config.output_dir)
        self._lock = RunLock(self.path)
        self._lock.acquire()
        try:
            if is_resumed:
                self._clear_partial()
            else:
                resolved = dataclasses.replace(config, output_dir=str(self.path))
                write_text_atomically(self.path / CONFIG_FILE, resolved.to_yaml())
        except BaseException:
            self._lock.release()
            raise
        self.checkpoints = Checkpoints(self.path)

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

    def _clear_partial(self) -> None:
        """Remove what a killed process was writing aside."""
        for partial in (*self.path.glob(".*.partial"), *(self.path / ADAPTERS).glob(".*.partial")):
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink()

    def close(self) -> None:
        """Let other processes in again; closing twice is harmless."""
        self._lock.release()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def metrics(self) -> Path:
        """One JSON object a line for every step and evaluation."""
        return self.path / "metrics.jsonl"

    @property
    def journal(self) -> Path:
        """What was asked of the run while it was on its way."""
        return self.path / "journal.jsonl"

    @property
    def tensorboard(self) -> Path:
        """Where TensorBoard looks."""
        return self.path / "tensorboard"

    def adapter(self, name: str) -> Path:
        """The folder of one adapter."""
        return self.path / ADAPTERS / name

    def save(self, model: LlamaForCausalLM, name: str) -> Path:
        """Write an adapter's weights as they are on the model; returns its folder."""
        path = self.adapter(name)
        save_adapter(model, name, path)
        return path

    def draw(self, expert_counts: Mapping[str, Sequence[Sequence[int]]]) -> None:
        """Draw the loss curves, and for routed adapters the load of every expert over the whole training.

        Args:
            expert_counts: adapter name to ``[layers, experts]`` tokens.
        """
        from moe_peft.training.display.plots import plot_expert_load, plot_loss_curves

        plot_loss_curves(self.metrics, self.path / "loss.png")
        for name, counts in expert_counts.items():
            plot_expert_load(load_shares(np.array(counts)), self.path / f"experts-{name}.png", name)
