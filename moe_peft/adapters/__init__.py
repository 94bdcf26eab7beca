"""The methods: one file each, and the registry that names them."""

from moe_peft.adapters.adalora import AdaLoraConfig
from moe_peft.adapters.adaptive_lora import AdaptiveLoraConfig
from moe_peft.adapters.bottleneck import BottleneckConfig
from moe_peft.adapters.dora import DoraConfig
from moe_peft.adapters.hierarchical_lora import HierarchicalLoraConfig
from moe_peft.adapters.ia3 import IA3Config
from moe_peft.adapters.lora import LoraConfig
from moe_peft.adapters.method import Method, Updates
from moe_peft.adapters.mixlora import MixLoraConfig
from moe_peft.adapters.p_tuning import PromptEncoderConfig
from moe_peft.adapters.prefix_tuning import PrefixTuningConfig
from moe_peft.adapters.prompt_tuning import PromptTuningConfig
from moe_peft.adapters.quantized_lora import QuantizedLoraConfig
from moe_peft.adapters.sparse_lora import SparseLoraConfig
from moe_peft.adapters.vera import VeraConfig

METHODS: dict[str, type[Method]] = {
    "lora": LoraConfig,
    "dora": DoraConfig,
    "mixlora": MixLoraConfig,
    "adalora": AdaLoraConfig,
    "adaptive_lora": AdaptiveLoraConfig,
    "bottleneck": BottleneckConfig,
    "ia3": IA3Config,
    "vera": VeraConfig,
    "sparse_lora": SparseLoraConfig,
    "hierarchical_lora": HierarchicalLoraConfig,
    "quantized_lora": QuantizedLoraConfig,
    "prompt_tuning": PromptTuningConfig,
    "p_tuning": PromptEncoderConfig,
    "prefix_tuning": PrefixTuningConfig,
}

__all__ = [
    "METHODS",
    "AdaLoraConfig",
    "AdaptiveLoraConfig",
    "BottleneckConfig",
    "DoraConfig",
    "HierarchicalLoraConfig",
    "IA3Config",
    "LoraConfig",
    "Method",
    "MixLoraConfig",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptTuningConfig",
    "QuantizedLoraConfig",
    "SparseLoraConfig",
    "Updates",
    "VeraConfig",
]
