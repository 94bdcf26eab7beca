"""The other end of `peer_process`: one trainer in a process of its own, a step a line.

Runs in the environments of the peers too, so it imports nothing of ours. The settings come as the first line of
standard input, JSON; then a line is the number of a step to take, and the answer its seconds and losses. While it waits
for a line the process sleeps.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peak_memory import peak_memory_gb

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
IGNORE_INDEX = -100

# Of a step's number; returns the loss of every adapter.
Step = Callable[[int], list[float]]


def serve(build: Callable[[dict[str, Any]], Step]) -> None:
    """Answer until standard input ends.

    Args:
        build: makes the trainer from the settings.
    """
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(values: dict[str, Any]) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    settings = json.loads(sys.stdin.readline())
    torch.set_num_threads(settings["num_threads"])
    on_gpu = torch.device(settings["device"]).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(settings["device"])
    synchronize = torch.cuda.synchronize if on_gpu else lambda: None
    step = build(settings)
    answer({"torch": torch.__version__, "threads": torch.get_num_threads()})
    for line in sys.stdin:
        synchronize()
        start = time.perf_counter()
        losses = step(int(line))
        synchronize()
        seconds = time.perf_counter() - start
        memory = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else peak_memory_gb()
        answer({"seconds": seconds, "losses": losses, "peak_memory_gb": memory})


def read_padded(path: str, pad_token: int, device: torch.device) -> list[dict[str, torch.Tensor]]:
    """Batches as rectangles: ``input_ids``, ``labels`` and ``attention_mask``, padded on the right to their longest."""
    batches = []
    for samples in json.loads(Path(path).read_text(encoding="utf-8")):
        longest = max(len(sample["input_ids"]) for sample in samples)

        def padded(key: str, filler: int, samples: list[Any] = samples, longest: int = longest) -> torch.Tensor:
            rows = [sample[key] + [filler] * (longest - len(sample[key])) for sample in samples]
            return torch.tensor(rows, device=device)

        real = [{"ones": [1] * len(sample["input_ids"])} for sample in samples]
        batches.append(
            {
                "input_ids": padded("input_ids", pad_token),
                "labels": padded("labels", IGNORE_INDEX),
                "attention_mask": padded("ones", 0, real),
            }
        )
    return batches
