"""MoE-PEFT: fine-tune many adapters at once on one frozen LLaMA-family model."""

import importlib.util
from pathlib import Path

if importlib.util.find_spec("moe_peft.kernels") is None:
    # An uninstalled checkout, or an install shadowed by one: `kernels/` lies beside the package, not inside it.
    __path__.append(str(Path(__file__).resolve().parent.parent))

from moe_peft import generation
from moe_peft.adapters import LoraConfig, MixLoraConfig
from moe_peft.config import TrainConfig
from moe_peft.data.tokenizer import load_tokenizer
from moe_peft.io.adapter_files import load_adapter, save_adapter
from moe_peft.io.base_model import load_base_model
from moe_peft.model.batch import BatchConfig, ModelInput, ModelOutput
from moe_peft.model.config import LlamaConfig, RopeScaling
from moe_peft.model.decoder import LlamaAttention, LlamaDecoderLayer, LlamaMLP
from moe_peft.model.llama import LlamaEmbedding, LlamaForCausalLM
from moe_peft.training.trainer import Trainer
from moe_peft.version import __version__

__all__ = [
    "BatchConfig",
    "LlamaAttention",
    "LlamaConfig",
    "LlamaDecoderLayer",
    "LlamaEmbedding",
    "LlamaForCausalLM",
    "LlamaMLP",
    "LoraConfig",
    "MixLoraConfig",
    "ModelInput",
    "ModelOutput",
    "RopeScaling",
    "TrainConfig",
    "Trainer",
    "__version__",
    "generation",
    "load_adapter",
    "load_base_model",
    "load_tokenizer",
    "save_adapter",
]
