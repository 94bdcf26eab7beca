"""The real peft around a transformers model, and ours with the same base weights; their outputs and gradients."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import peft
import torch
from builders import Run, assert_close, backward, fuse, gradients, random_samples
from hf_twin import hf_model, twin_of
from torch import Tensor, nn

from moe_peft import LlamaConfig, LlamaForCausalLM

SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 38,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
}
SAMPLES = random_samples((9, 4, 1, 6))


def base_pair(family: str = "llama", *, seed: int = 0) -> tuple[nn.Module, LlamaForCausalLM]:
    """A transformers model and ours. Qwen2 has biases on q, k and v; so has ``llama-biased``, on every projection."""
    if family == "llama-biased":
        biases = {"attention_bias": True, "mlp_bias": True}
        hf = hf_model("llama", {**SIZES, **biases, "tie_word_embeddings": False}, seed=seed)
        return hf, twin_of(hf, LlamaConfig(**SIZES, **biases))
    hf = hf_model(family, {**SIZES, "tie_word_embeddings": False}, seed=seed)
    return hf, twin_of(hf, LlamaConfig(**SIZES, **({"qkv_bias": True} if family == "qwen2" else {})))


def with_peft(hf: nn.Module, **settings: Any) -> nn.Module:
    """The model in peft's hands; what it says of settings that are tested here is not heard."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(hf, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()


def their_weights(theirs: nn.Module) -> dict[str, nn.Parameter]:
    """What peft trains, by the names of its files."""
    found = {name.replace(".default", ""): weight for name, weight in theirs.named_parameters() if weight.requires_grad}
    return {name.replace("vector.weight", "vector"): weight for name, weight in found.items()}


def copy_weights(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    """Every weight by its name; none is left over on either side."""
    assert source.keys() == target.keys()
    with torch.no_grad():
        for name, weight in target.items():
            weight.copy_(source[name])


def their_logits(theirs: nn.Module, samples: Sequence[Sequence[int]] = SAMPLES) -> Tensor:
    """Logits of every sample, ``[T, V]``."""
    return torch.cat([theirs(torch.tensor([list(sample)])).logits[0] for sample in samples])


def their_step(theirs: nn.Module) -> tuple[Tensor, Tensor]:
    """Logits and the mean loss over all tokens, after a backward."""
    logits, losses = [], []
    for sample in SAMPLES:
        logits.append(theirs(torch.tensor([sample])).logits[0])
        wanted = torch.tensor(sample[1:], dtype=torch.long)
        losses.append(nn.functional.cross_entropy(logits[-1][:-1], wanted, reduction="sum"))
    loss = sum(losses) / sum(len(sample) - 1 for sample in SAMPLES)
    loss.backward()
    return torch.cat(logits), loss


def our_logits(model: LlamaForCausalLM, name: str) -> Tensor:
    """As ``their_logits``."""
    return model(fuse(Run(name, SAMPLES), with_labels=False))[0].logits.detach()


def assert_same_step(theirs: nn.Module, model: LlamaForCausalLM, name: str, tolerance: float = 1e-4) -> None:
    """Logits, loss and every gradient agree, and none of them is trivial."""
    expected, expected_loss = their_step(theirs)
    (output,) = model(fuse(Run(name, SAMPLES)), return_logits=True)
    backward([output])
    assert_close(output.logits, expected, tolerance, "logits")
    assert_close(output.loss, expected_loss, tolerance, "loss")
    live, found = their_weights(theirs), gradients(model, name)
    assert live.keys() == found.keys()
    for key, gradient in found.items():
        assert live[key].grad.abs().max() > 0, key
        assert_close(gradient, live[key].grad, tolerance, key)
    assert (our_logits(model, "") - output.logits).abs().max() > 1e-2, "the adapter must act"
