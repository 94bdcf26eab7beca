"""Adapters on disk and managers of them, for the tests of ``AdapterManager``."""

import threading
from collections.abc import Callable
from pathlib import Path

import torch
from builders import fuse, random_run, tiny_model
from torch import Tensor

from moe_peft import AdapterManager, LlamaForCausalLM

SIZES = {"a": 1, "b": 2, "c": 3, "d": 4}  # names and ranks


def bytes_of(rank: int) -> int:
    """In memory, of a LoRA on every projection of the tiny model: float32, as worked out by hand."""
    in_and_out = [(24, 24), (24, 12), (24, 12), (24, 24), (24, 38), (24, 38), (38, 24)]
    return 2 * 4 * rank * sum(i + o for i, o in in_and_out)


def manager_of(folder: Path, ranks: int | None = None) -> AdapterManager:
    """A manager on a model of its own; its budget is what a LoRA of so many ranks takes."""
    return AdapterManager(tiny_model(), folder, memory_budget=None if ranks is None else bytes_of(ranks))


def loaded(manager: AdapterManager) -> str:
    """The names in memory, one letter each."""
    found = "".join(info.name for info in manager.list() if info.is_loaded)
    assert sorted(found) == sorted(manager.model.adapter_names)
    return found


def answer(model: LlamaForCausalLM, name: str) -> Tensor:
    """Logits of a few tokens through an adapter."""
    with torch.inference_mode():
        (output,) = model(fuse(random_run(name, [5, 3], seed=7), with_labels=False))
    return output.logits


def run_threads(*jobs: Callable[[], None]) -> None:
    """All jobs at once; the first error of any is this one's."""
    errors: list[BaseException] = []

    def guarded(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(job,), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "threads wait for each other"
    if errors:
        raise errors[0]
