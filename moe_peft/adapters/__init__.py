"""The methods: one file each, and the registry that names them."""

from moe_peft.adapters.lora import LoraConfig
from moe_peft.adapters.method import Method
from moe_peft.adapters.mixlora import MixLoraConfig

METHODS: dict[str, type[Method]] = {
    "lora": LoraConfig,
    "mixlora": MixLoraConfig,
}

__all__ = ["METHODS", "LoraConfig", "Method", "MixLoraConfig"]
