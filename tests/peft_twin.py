"""A model of the real peft and ours that carry the same random adapter ``qa``."""

from pathlib import Path

import peft
import torch
from builders import Run, add_random_adapter, fuse, random_samples, randomize
from hf_twin import ExactRotary, hf_model, twin_of
from torch import Tensor, nn

from moe_peft import LlamaConfig, LlamaForCausalLM, load_adapter, save_adapter

SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 38,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
}
SAMPLES = random_samples((9, 4, 1, 6))


def bases(*, dtype: torch.dtype = torch.float32, **changes: object) -> tuple[nn.Module, LlamaForCausalLM]:
    """A base model of transformers and ours with its weights; in float64 both with exact rotary tables."""
    hf = hf_model("llama", {**SIZES, **changes}, dtype=dtype)
    model = twin_of(hf, LlamaConfig(**SIZES, **changes))
    if dtype == torch.float64:
        hf.model.rotary_emb = ExactRotary(10000.0, model.config_.head_size)
    return hf, model


def pair(
    ours: object, theirs: peft.PeftConfig, *, dtype: torch.dtype = torch.float32, **changes: object
) -> tuple[nn.Module, LlamaForCausalLM, dict[str, nn.Parameter]]:
    """peft's model, ours, and peft's parameters under the names of a folder."""
    hf, model = bases(dtype=dtype, **changes)
    add_random_adapter(model, "qa", ours, seed=4)
    wrapped = peft.get_peft_model(hf, theirs)
    if dtype == torch.float64:  # peft casts its own weights to float32
        wrapped.to(dtype)
    live = {name.replace(".default", ""): p for name, p in wrapped.named_parameters() if p.requires_grad}
    saved = model.adapter_config("qa").to_saved(model, "qa")
    assert live.keys() == {name for name in saved if name in live} == set(model.adapter_state("qa"))
    with torch.no_grad():
        for name, parameter in live.items():
            parameter.copy_(saved[name])
    return wrapped, model, live


def logits(theirs: nn.Module, samples: list[list[int]] = SAMPLES) -> Tensor:
    """Of every token of every sample."""
    return torch.cat([theirs(input_ids=torch.tensor([sample])).logits[0] for sample in samples])


def logits_and_loss(theirs: nn.Module) -> tuple[Tensor, Tensor]:
    """And the mean loss over all supervised tokens, after its backward."""
    found = logits(theirs)
    shifted = torch.cat([part[:-1] for part in found.split([len(sample) for sample in SAMPLES])])
    targets = torch.tensor([token for sample in SAMPLES for token in sample[1:]])
    loss = nn.functional.cross_entropy(shifted, targets)
    loss.backward()
    return found, loss


def our_logits(model: LlamaForCausalLM, name: str) -> Tensor:
    """Of the same samples."""
    with torch.no_grad():
        (output,) = model(fuse(Run(name, SAMPLES)), return_logits=True)
    return output.logits


def logits_of_our_folder(config: object, folder: Path, **changes: object) -> tuple[Tensor, Tensor]:
    """Our logits with a random adapter, and peft's of what we saved of it."""
    hf, model = bases(**changes)
    add_random_adapter(model, "qa", config, seed=4)
    save_adapter(model, "qa", folder / "qa")
    theirs = peft.PeftModel.from_pretrained(hf, str(folder / "qa")).eval()
    with torch.no_grad():
        expected = logits(theirs)
    assert (our_logits(model, "") - expected).abs().max() > 1e-2, "the adapter must change something"
    return our_logits(model, "qa"), expected


def logits_of_their_folder(
    config: peft.PeftConfig, folder: Path, marks: tuple[str, ...], **changes: object
) -> tuple[LlamaForCausalLM, Tensor, Tensor]:
    """Our model, its logits with the adapter ``qa`` that peft saved, and peft's own.

    Args:
        marks: parts of the names of the weights that are made random.
    """
    hf, model = bases(**changes)
    theirs = peft.get_peft_model(hf, config).eval()
    weights = {name: weight for name, weight in theirs.named_parameters() if any(mark in name for mark in marks)}
    randomize(weights, seed=3, std=0.2)
    theirs.save_pretrained(str(folder / "qa"))
    load_adapter(model, folder / "qa")
    with torch.no_grad():
        expected = logits(theirs)
    assert (our_logits(model, "") - expected).abs().max() > 1e-2
    return model, our_logits(model, "qa"), expected
