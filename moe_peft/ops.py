"""The one place that picks how an operation runs: a Triton kernel or its plain-PyTorch reference."""

from moe_peft.kernels.causal_attention.op import causal_attention
from moe_peft.kernels.linear_cross_entropy.op import linear_cross_entropy
from moe_peft.kernels.lora_linear.op import lora_linear
from moe_peft.kernels.lora_linear.reference import LoraRange
from moe_peft.kernels.mixlora_ffn.op import mixlora_ffn
from moe_peft.kernels.mixlora_ffn.reference import ExpertFactors

__all__ = ["ExpertFactors", "LoraRange", "causal_attention", "linear_cross_entropy", "lora_linear", "mixlora_ffn"]
