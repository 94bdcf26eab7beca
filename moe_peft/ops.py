"""The one place that picks how an operation runs: a Triton kernel, compiled C++ or its plain-PyTorch reference."""

from moe_peft.kernels.cache_folder import cache_folder
from moe_peft.kernels.causal_attention.op import causal_attention
from moe_peft.kernels.compiled import compiled_library, needs_compiling
from moe_peft.kernels.invariance import batch_invariant, is_batch_invariant
from moe_peft.kernels.linear_cross_entropy.op import linear_cross_entropy
from moe_peft.kernels.lora_linear.op import lora_linear
from moe_peft.kernels.lora_linear.ranges import LoraRange
from moe_peft.kernels.mixlora_ffn.inputs import ExpertFactors, FfnPart
from moe_peft.kernels.mixlora_ffn.op import mixlora_ffn_group
from moe_peft.kernels.recompute import Recomputable
from moe_peft.kernels.rms_norm.op import rms_norm
from moe_peft.kernels.rotary.op import rotary
from moe_peft.kernels.routing.op import route
from moe_peft.kernels.swiglu.op import swiglu
from moe_peft.kernels.wide_linear.op import wide_linear

__all__ = [
    "ExpertFactors",
    "FfnPart",
    "LoraRange",
    "Recomputable",
    "batch_invariant",
    "cache_folder",
    "causal_attention",
    "compiled_library",
    "is_batch_invariant",
    "linear_cross_entropy",
    "lora_linear",
    "mixlora_ffn_group",
    "needs_compiling",
    "rms_norm",
    "rotary",
    "route",
    "swiglu",
    "wide_linear",
]
