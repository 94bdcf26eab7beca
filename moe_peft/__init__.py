"""MoE-PEFT: fine-tune many adapters at once on one frozen LLaMA-family model."""

import importlib.util
from pathlib import Path

if importlib.util.find_spec("moe_peft.kernels") is None:
    # An uninstalled checkout, or an install shadowed by one: `kernels/` lies beside the package, not inside it.
    __path__.append(str(Path(__file__).resolve().parent.parent))

from moe_peft import generation
from moe_peft.adapters import (
    AdaLoraConfig,
    AdaptiveLoraConfig,
    BottleneckConfig,
    DoraConfig,
    HierarchicalLoraConfig,
    IA3Config,
    LoraConfig,
    MixLoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    QuantizedLoraConfig,
    SparseLoraConfig,
    VeraConfig,
)
from moe_peft.adapters.arithmetic import combine_adapters
from moe_peft.comparison import MethodCost, compare_methods
from moe_peft.config import TrainConfig
from moe_peft.data.tokenizer import load_tokenizer
from moe_peft.io.adapter_files import load_adapter, save_adapter
from moe_peft.io.base_model import load_base_model
from moe_peft.io.hf_export import save_merged_model
from moe_peft.manager import AdapterManager
from moe_peft.model.batch import BatchConfig, ModelInput, ModelOutput
from moe_peft.model.config import LlamaConfig, RopeScaling
from moe_peft.model.decoder import LlamaAttention, LlamaDecoderLayer, LlamaMLP
from moe_peft.model.llama import LlamaEmbedding, LlamaForCausalLM
from moe_peft.training.trainer import Trainer
from moe_peft.version import __version__

__all__ = [
    "AdaLoraConfig",
    "AdapterManager",
    "AdaptiveLoraConfig",
    "BatchConfig",
    "BottleneckConfig",
    "DoraConfig",
    "HierarchicalLoraConfig",
    "IA3Config",
    "LlamaAttention",
    "LlamaConfig",
    "LlamaDecoderLayer",
    "LlamaEmbedding",
    "LlamaForCausalLM",
    "LlamaMLP",
    "LoraConfig",
    "MethodCost",
    "MixLoraConfig",
    "ModelInput",
    "ModelOutput",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptTuningConfig",
    "QuantizedLoraConfig",
    "RopeScaling",
    "SparseLoraConfig",
    "TrainConfig",
    "Trainer",
    "VeraConfig",
    "__version__",
    "combine_adapters",
    "compare_methods",
    "generation",
    "load_adapter",
    "load_base_model",
    "load_tokenizer",
    "save_adapter",
    "save_merged_model",
]
