"""A run's numbers in TensorBoard: one curve an adapter, and histograms of the experts' load."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moe_peft.training.display.expert_load import dead_experts, imbalance, worst_imbalance
from moe_peft.training.folder.metrics import EvalMetrics, ExpertMetrics, JobMetrics, Row, StepMetrics

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def check_tensorboard() -> None:
    """Refuse ``tensorboard: true`` where the package is missing.

    Raises:
        ValueError: telling how to install it.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise ValueError(
            "tensorboard=true needs the package tensorboard, which is not installed: "
            "pip install 'moe-peft-torch[tensorboard]'"
        )


class Scalars:
    """Writes rows as TensorBoard's events, a folder an adapter, so that one chart shows all of them.

    A resumed run goes on where its rows do: each adapter's events behind its first new row are purged.

    Args:
        folder: the run's ``tensorboard`` folder.

    Raises:
        ValueError: when tensorboard is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        check_tensorboard()
        self._folder = Path(folder)
        self._writers: dict[str, SummaryWriter] = {}

    def take(self, row: Row) -> None:
        """Take in one row."""
        if isinstance(row, JobMetrics):
            return  # a state is no number
        writer = self._writer(row)
        if isinstance(row, StepMetrics):
            self._take_step(writer, row)
        elif isinstance(row, EvalMetrics):
            writer.add_scalar("loss/held-out", row.eval_loss, row.step)
        elif isinstance(row, ExpertMetrics):
            self._take_experts(writer, row)
        writer.flush()  # what a killed run had written stays, as in metrics.jsonl

    def close(self) -> None:
        """Close the files; closing twice is harmless."""
        while self._writers:
            self._writers.popitem()[1].close()

    def _writer(self, row: StepMetrics | EvalMetrics | ExpertMetrics) -> "SummaryWriter":
        if row.adapter not in self._writers:
            from torch.utils.tensorboard import SummaryWriter

            self._writers[row.adapter] = SummaryWriter(self._folder / row.adapter, purge_step=row.step)
        return self._writers[row.adapter]

    def _take_step(self, writer: "SummaryWriter", row: StepMetrics) -> None:
        values = {
            "loss/training": row.loss,
            "loss/router": row.aux_loss or None,
            "step/lr": row.lr,
            "step/grad_norm": row.grad_norm,
            "step/epoch": row.epoch,
            "step/skipped": row.skipped_steps,
            "speed/supervised_tokens_per_second": row.tokens_per_second,
            "speed/tokens_per_second": row.num_tokens / max(row.seconds, 1e-9),
        }
        for tag, value in values.items():
            if value is not None:
                writer.add_scalar(tag, value, row.step)

    def _take_experts(self, writer: "SummaryWriter", row: ExpertMetrics) -> None:
        counts = np.array(row.counts, dtype=np.int64)  # [routed layers, E]
        writer.add_scalar("experts/largest_over_mean", worst_imbalance(counts), row.step)
        writer.add_scalar("experts/dead", len(dead_experts(counts)), row.step)
        places = np.arange(counts.shape[1])
        for layer, (load, ratio) in enumerate(zip(counts, imbalance(counts), strict=True)):
            writer.add_scalar(f"experts_largest_over_mean/layer_{layer:02d}", ratio, row.step)
            # A bucket an expert: the histogram's x is the expert, its height the tokens that it got.
            writer.add_histogram_raw(
                f"expert_load/layer_{layer:02d}",
                min=0,
                max=len(load) - 1,
                num=int(load.sum()),
                sum=float((load * places).sum()),
                sum_squares=float((load * places**2).sum()),
                bucket_limits=(places + 0.5).tolist(),
                bucket_counts=load.tolist(),
                global_step=row.step,
            )
