"""The fixtures of the manager's tests."""

from pathlib import Path

import pytest
from builders import add_random_adapter, tiny_model
from managed import SIZES, answer
from torch import Tensor

from moe_peft import LoraConfig, load_adapter, save_adapter


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Random adapters a, b, c and d, saved from a model of their own."""
    model = tiny_model()
    for name, rank in SIZES.items():
        add_random_adapter(model, name, LoraConfig(r=rank), seed=rank)
        save_adapter(model, name, tmp_path / "adapters" / name)
    return tmp_path / "adapters"


@pytest.fixture
def truth(folder: Path) -> dict[str, Tensor]:
    """Each adapter's answer on a model that holds all of them."""
    model = tiny_model()
    for name in SIZES:
        load_adapter(model, folder / name)
    return {name: answer(model, name) for name in SIZES}
