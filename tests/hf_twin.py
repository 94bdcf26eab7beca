"""A transformers model and ours with the same random weights, copied name by name."""

import torch
import transformers
from builders import randomize
from torch import nn

from moe_peft import LlamaConfig, LlamaForCausalLM

FAMILIES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}


def hf_model(family: str, settings: dict, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """A transformers model whose every weight is random, in eval mode."""
    config_class, model_class = FAMILIES[family]
    config = config_class(**settings, attn_implementation="eager", use_cache=False)
    model = model_class(config)
    weights = dict(model.named_parameters())
    randomize(weights, seed)
    return model.to(dtype).eval()


def twin_of(hf: nn.Module, config: LlamaConfig) -> LlamaForCausalLM:
    """Ours, with the weights of ``hf``; no weight on either side is left over."""
    model = LlamaForCausalLM(config).to(next(hf.parameters()).dtype).eval()
    ours = dict(model.named_parameters())
    theirs = {our_name(name): weight for name, weight in hf.named_parameters()}
    assert sorted(ours) == sorted(theirs)
    with torch.no_grad():
        for name, weight in ours.items():
            weight.copy_(theirs[name])
    return model


def our_name(name: str) -> str:
    """The name in our model of a weight of transformers'."""
    name = name.removeprefix("model.").replace("lm_head.", "lm_head_.")
    return name.replace("_proj.", "_proj.base_layer_.")


class ExactRotary(nn.Module):
    """Plain RoPE in float64, to stand in for transformers' table, which is float32 whatever the model's dtype."""

    def __init__(self, theta: float, head_dim: int) -> None:
        super().__init__()
        self.theta = theta
        self.head_dim = head_dim

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        turns = [self.theta ** (-2 * pair / self.head_dim) for pair in range(self.head_dim // 2)]
        angles = position_ids[..., None].double() * torch.tensor(turns * 2, dtype=torch.float64)
        return angles.cos(), angles.sin()
