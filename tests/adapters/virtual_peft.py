"""The real peft's prompt learning beside ours: the same base, the same weights, the same samples."""

import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from builders import IGNORE, Run, add_random_adapter, assert_close, fuse, random_run, run_step
from hf_twin import ExactRotary, hf_model, twin_of
from torch import Tensor, nn

from moe_peft import LlamaConfig, LlamaForCausalLM, save_adapter
from moe_peft.adapters import Method

SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 38,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
}
BASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # family, its settings, ours where they differ
    "grouped": ("llama", {}, {}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 10}, {}),
    "all heads": ("llama", {"num_key_value_heads": 4}, {}),
    "window": ("mistral", {"sliding_window": 5}, {}),
    "dynamic": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, "max_position_embeddings": 8},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    ),
    "norms": ("qwen3", {"head_dim": 6}, {"qk_norm": True}),
}
RUN = random_run("qa", (9, 4, 1, 6), seed=3)


def make_bases(base: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, LlamaForCausalLM]:
    """A transformers model and ours with the same random weights."""
    family, theirs, ours = BASES[base]
    hf = hf_model(family, {**SIZES, **theirs}, dtype=dtype)
    shared = {key: value for key, value in theirs.items() if key != "rope_parameters"}
    config = {**SIZES, **shared, **ours}
    if "rope_scaling" in config:
        from moe_peft import RopeScaling

        config["rope_scaling"] = RopeScaling(**config["rope_scaling"])
    if dtype == torch.float64:
        hf.model.rotary_emb = ExactRotary(10000.0, hf.config.head_dim)
    return hf, twin_of(hf, LlamaConfig(**config))


def make_pair(
    config: Method, their_config: peft.PeftConfig, base: str = "grouped", dtype: torch.dtype = torch.float32
) -> tuple[peft.PeftModel, LlamaForCausalLM, dict[str, nn.Parameter]]:
    """A peft model and ours that carry the same random adapter ``qa``, and peft's weights under our names."""
    hf, model = make_bases(base, dtype)
    add_random_adapter(model, "qa", config, seed=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of settings that the MLP ignores
        theirs = peft.get_peft_model(hf, their_config).to(dtype).eval()
    encoder = theirs.prompt_encoder["default"]
    live = dict(encoder.named_parameters())
    if len(live) == 1:
        live = {"prompt_embeddings": live["embedding.weight"]}
    state = model.adapter_state("qa")
    assert live.keys() == state.keys()
    with torch.no_grad():
        for name, parameter in live.items():
            parameter.copy_(state[name])
    return theirs, model, live


def their_step(theirs: nn.Module, run: Run) -> tuple[Tensor, Tensor]:
    """Logits of every real token, and the mean loss over all supervised tokens, as peft shifts labels."""
    rows, total, count = [], torch.zeros((), dtype=torch.float64), 0
    for sample, labels in zip(run.samples, run.labels or run.samples, strict=True):
        output = theirs(input_ids=torch.tensor([sample]), labels=torch.tensor([labels]))
        logits = output.logits[0]
        rows.append(logits[-len(sample) :])
        # What peft puts before the labels: as many as there are logits more than tokens.
        padded = torch.tensor([IGNORE] * (len(logits) - len(sample)) + list(labels))
        seen = padded[1:] != IGNORE
        if seen.any():
            own = nn.functional.cross_entropy(logits[:-1], padded[1:], ignore_index=IGNORE, reduction="sum")
            assert_close(output.loss * seen.sum(), own, 1e-5, "peft's own loss")
            total = total + own
            count += int(seen.sum())
    return torch.cat(rows), total / count


def our_step(model: LlamaForCausalLM, run: Run) -> tuple[Any, dict[str, Tensor]]:
    """Our output, and the gradients of every weight."""
    (output,), found = run_step(model, run)
    return output, found[run.adapter_name]


def their_saved(theirs: peft.PeftModel, folder: Path) -> Path:
    theirs.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)
    return folder


def reload_into_peft(model: LlamaForCausalLM, base: str, folder: Path) -> nn.Module:
    """Our adapter's folder on a fresh base, read by peft."""
    save_adapter(model, "qa", folder)
    hf, _ = make_bases(base)
    return peft.PeftModel.from_pretrained(hf, str(folder)).eval()


def our_logits(model: LlamaForCausalLM, run: Run, name: str = "qa") -> Tensor:
    with torch.no_grad():
        (output,) = model(fuse(Run(name, run.samples), with_labels=False))
    return output.logits


def their_logits(theirs: nn.Module, run: Run) -> Tensor:
    with torch.no_grad():
        return torch.cat([theirs(input_ids=torch.tensor([sample])).logits[0, -len(sample) :] for sample in run.samples])
