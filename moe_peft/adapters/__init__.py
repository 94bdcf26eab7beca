"""The methods: one file each, and the registry that names them."""

from moe_peft.adapters.lora import LoraConfig
from moe_peft.adapters.mixlora import MixLoraConfig

METHODS: dict[str, type[LoraConfig]] = {"lora": LoraConfig, "mixlora": MixLoraConfig}

__all__ = ["METHODS", "LoraConfig", "MixLoraConfig"]
