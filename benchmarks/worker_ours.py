"""Ours as a worker of `peers`."""

import json
from pathlib import Path
from typing import Any

import torch
from batches import Batch
from ours import AdapterSettings, TrainingStep, parse_variant
from presets import build_model, random_model
from worker import Step, serve

from moe_peft.command.memory import reuse_freed_memory
from moe_peft.data.samples import Sample
from moe_peft.io.hf_config import read_llama_config


def build(settings: dict[str, Any]) -> Step:
    """The step of the train command; ``mode`` is the dtype of the frozen weights."""
    variant = parse_variant(settings["variant"])
    reuse_freed_memory(variant.num_adapters)
    dtype, device = getattr(torch, settings["mode"]), torch.device(settings["device"])
    folder = Path(settings["model"])
    if (folder / "model.safetensors").is_file():
        model = build_model(str(folder), dtype, device)
    else:
        model = random_model(read_llama_config(folder), dtype, device)
    read = json.loads(Path(settings["batches"]).read_text(encoding="utf-8"))
    batches = [
        Batch(tuple(Sample(tuple(sample["input_ids"]), tuple(sample["labels"])) for sample in samples))
        for samples in read
    ]
    adapters = AdapterSettings(
        r=settings["rank"],
        num_experts=settings["experts"],
        top_k=settings["top_k"],
        lora_dropout=settings["dropout"],
    )
    step = TrainingStep(model, variant, adapters, batches)

    def run(number: int) -> list[float]:
        step(number)
        return step.losses

    return run


if __name__ == "__main__":
    serve(build)
