"""With N adapters the base runs once over all tokens: it takes as many large matrix products as with one adapter."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import adapter_entry, new_trainer, run_config
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.usefixtures("no_pictures")

# The base's projections have 12 rows or more; ranks, experts and their products stay below.
SMALLEST_OF_BASE = 12


class LargeProducts(TorchDispatchMode):
    """Counts the matrix products whose three sizes are all large, but for the head's: its rows come in chunks."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self._vocab_size = vocab_size
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        matrices = [tensor for tensor in args if isinstance(tensor, torch.Tensor) and tensor.dim() == 2]
        is_linear = "linear" in function.__name__  # oneDNN's, which takes the second matrix as nn.Linear holds it
        if (is_linear or "mm" in function.__name__) and len(matrices) >= 2:
            first, second = matrices[:2] if is_linear else matrices[-2:]
            sizes = (*first.shape, second.shape[0 if is_linear else 1])
            if min(sizes) >= SMALLEST_OF_BASE and self._vocab_size not in sizes:
                self.counts["products"] += 1
                self.counts["work"] += sizes[0] * sizes[1] * sizes[2]
        return function(*args, **(kwargs or {}))


def of_one_step(base: Path, data: str, output_dir: Path, num_adapters: int, method: str) -> tuple[int, float]:
    """Large products of a fused step, and their work a token."""
    changes = {"method": method, "num_experts": 2} if method == "mixlora" else {"method": method}
    # The same samples for all, so that a token is a token.
    entries = [adapter_entry(f"a{i}", data, r=2, batch_size=18, **changes) for i in range(num_adapters)]
    trainer = new_trainer(run_config(base, output_dir, *entries))
    trainer.model.train()
    micro_batches = trainer.fused_run.dispatcher.next_batch()
    assert len(micro_batches) == num_adapters
    with LargeProducts(trainer.model.config_.vocab_size) as products:
        trainer.fused_run.take_step(micro_batches)
    num_tokens = sum(micro_batch.num_tokens for micro_batch in micro_batches)
    return products.counts["products"], products.counts["work"] / num_tokens


@pytest.mark.parametrize("method", ["lora", "mixlora"])
def test_the_base_runs_once_for_all(method: str, base: Path, data: str, tmp_path: Path) -> None:
    num_products, work = of_one_step(base, data, tmp_path / "one", 1, method)
    assert num_products > 20
    num_of_five, work_of_five = of_one_step(base, data, tmp_path / "five", 5, method)
    assert num_of_five == num_products
    assert work_of_five == pytest.approx(work, rel=0.05)
