"""Trained sparse LoRA: the zeros in its file, and a resumed run that ends in the same bits."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from resuming import assert_same_run, run_and_die
from safetensors.torch import load_file
from tiny_run import adapter_entry, run_config, train

from moe_peft.config import TrainConfig

KINDS = {
    "fixed": {"sparsity": 0.75},
    "moved": {"sparsity": 0.5, "mask_type": "movement", "prune_start": 0.2, "prune_end": 0.8},
}


@pytest.fixture(autouse=True)
def _without_pictures(no_pictures: None) -> None:
    """The pictures take longer than everything else."""


def config_of(base: Path, data: str, folder: Path) -> TrainConfig:
    """A run of both kinds of masks, with weight decay and dropout."""
    shared = {"method": "sparse_lora", "max_steps": 6, "weight_decay": 0.5, "lora_dropout": 0.1}
    entries = [adapter_entry(name, data, **shared, **settings) for name, settings in KINDS.items()]
    return run_config(base, folder, *entries, save_steps=1)


def test_zeros_are_in_the_file_and_a_killed_run_ends_in_the_same_bits(base: Path, data: str, tmp_path: Path) -> None:
    train(config_of(base, data, tmp_path / "whole"))
    for name, settings in KINDS.items():
        tensors = load_file(tmp_path / "whole" / "adapters" / name / "adapter_model.safetensors")
        weights = {key: weight for key, weight in tensors.items() if key.endswith(".weight")}
        assert len(weights) == len(tensors) / 2 == 28
        for key, weight in weights.items():
            assert (weight == 0).sum() == settings["sparsity"] * weight.numel(), (name, key)
            packed = tensors[key.replace(".weight", ".mask")]
            assert packed.dtype == torch.uint8
            assert packed.numel() == math.ceil(weight.numel() / 8)
            kept = np.unpackbits(packed.numpy(), bitorder="little")[: weight.numel()]
            assert np.array_equal(kept == 0, weight.flatten().numpy() == 0), (name, key)
    for forward in (2, 4, 6):  # before pruning begins, in the middle of it, and after it
        folder = tmp_path / f"killed-{forward}"
        assert run_and_die(config_of(base, data, folder), forward)
        assert not run_and_die(config_of(base, data, folder), 10**5)
        assert_same_run(folder, tmp_path / "whole")
