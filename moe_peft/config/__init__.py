"""The dataclasses of a training run, and how they are read."""

from moe_peft.config.job import AdapterJob
from moe_peft.config.run import TrainConfig
from moe_peft.config.sweep import Sweep

__all__ = ["AdapterJob", "Sweep", "TrainConfig"]
