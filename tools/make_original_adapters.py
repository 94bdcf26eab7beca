"""Makes the adapter folders of tests/io/fixtures/original with the original itself, PyPI's moe-peft 2.0.2.

    PYTHON tools/make_original_adapters.py tests/io/fixtures/original

PYTHON is of an environment that has the original: ``benchmarks/peers.py`` makes one for its cases with it. The script
writes a tiny random base model, adapters as the original's own ``save_adapter_weight`` leaves them, and the logits that
the original computes after its own ``load_adapter`` has read them back. It needs nothing of this project.
"""

import json
import os
import sys
from pathlib import Path

os.environ["MOE_PEFT_EXECUTOR_TYPE"] = "CPU"  # it reads this as it is imported

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import moe_peft  # theirs, not ours
from moe_peft.tasks import CasualTask
from moe_peft.trainer import TrainConfig, save_adapter_weight

BASE = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
# Its dropout stays on when it evaluates and may not be 0, so none means one in a million.
FACTORS = {"r": 4, "lora_alpha": 6, "lora_dropout": 1e-6}
MIXTURE = {"routing_strategy": "mixlora", "num_experts": 3, "top_k": 2}
FFN = ["gate_proj", "up_proj", "down_proj"]
ADAPTERS = {
    "lora": ("LORA", {**FACTORS, "target_modules": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]}),
    "rslora": ("LORA", {**FACTORS, "use_rslora": True, "target_modules": {"k_proj": True, "gate_proj": True}}),
    "mixlora": ("MIXLORA", {**FACTORS, **MIXTURE, "target_modules": ["v_proj", "gate_proj", "down_proj"]}),
    "expert-lora": (
        "MIXLORA",
        {
            **FACTORS,
            **MIXTURE,
            "target_modules": ["q_proj", "o_proj", *FFN],
            "expert_lora": {"r": 2, "lora_alpha": 8, "lora_dropout": 2e-6, "use_rslora": True},
        },
    ),
}
SAMPLES = [[1, 7, 30, 12, 5, 5, 19, 2], [3, 28, 11], [14]]


def main(folder: Path) -> None:
    """Write everything, the base first."""
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)  # so that no path of this machine ends up in the adapters
    write_base(Path("base"))
    expected = {"samples": torch.tensor([token for sample in SAMPLES for token in sample])}
    expected["lengths"] = torch.tensor([len(sample) for sample in SAMPLES])
    for name, (kind, settings) in ADAPTERS.items():
        write_adapter(name, kind, settings)
        expected[name] = logits_of(name)
    save_file(expected, "logits.safetensors")


def write_base(folder: Path) -> None:
    """A LLaMA whose every weight is random, in float16 to be small."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**BASE))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(mean=1.0 if "norm" in name else 0.0, std=0.25)
    folder.mkdir(exist_ok=True)
    weights = {name: weight.half() for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    settings = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", **BASE}
    (folder / "config.json").write_text(json.dumps({**settings, "rope_theta": 10000.0}, indent=2) + "\n")


def load_base() -> moe_peft.LLMModel:
    """The base model as the original runs it."""
    return moe_peft.LLMModel.from_pretrained("base", "cpu", load_dtype=torch.float32)


def write_adapter(name: str, kind: str, settings: dict) -> None:
    """An adapter with random weights, saved by the original."""
    model = load_base()
    model.init_adapter(moe_peft.adapter_factory(kind, name, **settings))
    with torch.no_grad():
        for key, weight in sorted(model.get_adapter_weight_dict(name).items()):
            weight.normal_(std=1.0 if "moe_gate" in key else 0.3)
    config = TrainConfig(adapter_name=name)
    config.task_ = CasualTask()
    save_adapter_weight(model, config, ".")


def logits_of(name: str) -> torch.Tensor:
    """What the original computes from the folder, ``[tokens of all samples, V]``."""
    model = load_base()
    model.load_adapter(name, name)
    found = []
    for sample in SAMPLES:
        batch = moe_peft.LLMModelInput(
            batch_configs_=[moe_peft.LLMBatchConfig(name, 0, 1)],
            batch_tokens_=[sample],
            batch_masks_=[[1] * len(sample)],
            inference_mode_=True,
        )
        with torch.no_grad():
            found.append(model.forward(batch)[0].logits[0])
    return torch.cat(found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
