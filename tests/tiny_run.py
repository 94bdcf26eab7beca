"""A base model folder small enough to train in milliseconds, and configs of runs on it."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import tokenizers
import torch
from builders import randomize
from rich.console import Console
from safetensors.torch import save_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from moe_peft import LlamaConfig, LlamaForCausalLM, Trainer
from moe_peft.config import TrainConfig
from moe_peft.training.trainer import TrainResult

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<turn>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<turn>{{ message['role'] }}\n{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def byte_tokenizer() -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer, trained here."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["Below is an instruction that describes a task. Write a response"] * 4, trainer)
    return tokenizer


def make_base_folder(folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Path:
    """A Hugging Face folder of a tiny random LLaMA, with a template for short prompts in ``short.yaml``.

    Args:
        changes: fields of config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    fields = {"vocab_size": tokenizer.get_vocab_size(), **MODEL, **changes}
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "short.yaml").write_text("prompt_input: '{instruction} {input}: '\nprompt_no_input: '{instruction}: '\n")
    known = LlamaConfig.__dataclass_fields__
    model = LlamaForCausalLM(LlamaConfig(**{key: value for key, value in fields.items() if key in known}))
    weights = dict(model.named_parameters())
    randomize(weights, seed, std=0.2)
    tensors = {
        "model." + name.replace(".base_layer_", ""): weight.detach().to(dtype) for name, weight in weights.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def make_base_gguf(path: Path) -> Path:
    """The same as one GGUF file: its shapes and its tokenizer, with other weights."""
    tokenizer = byte_tokenizer()
    tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    merges = [" ".join(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(256)
    writer.add_embedding_length(24)
    writer.add_feed_forward_length(36)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL_TOKENS else 1 for token in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {"token_embd": (len(tokens), 24), "output_norm": (24,), "blk.0.attn_norm": (24,), "blk.0.ffn_norm": (24,)}
    shapes |= {"blk.0.attn_q": (24, 24), "blk.0.attn_k": (12, 24), "blk.0.attn_v": (12, 24)}
    shapes |= {"blk.0.attn_output": (24, 24), "blk.0.ffn_gate": (36, 24), "blk.0.ffn_up": (36, 24)}
    shapes |= {"blk.0.ffn_down": (24, 36)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", torch.full(shape, 0.1).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def instructions(count: int, *, shift: int = 0) -> list[dict[str, str]]:
    """Records with answers of different lengths."""
    return [
        {"instruction": f"Repeat {i % 5}", "input": "x" * (i % 3), "output": f"{'ab' * (1 + i % 4)} {i % 5}"}
        for i in range(shift, shift + count)
    ]


def write_jsonl(path: Path, records: Sequence[Mapping[str, Any]]) -> str:
    """One record a line; returns the path as a config spells it."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def adapter_entry(name: str, data: str, **changes: Any) -> dict[str, Any]:
    """An adapter's entry in a config, for a run of a few steps."""
    entry = {
        "name": name,
        "method": "lora",
        "data": data,
        "r": 4,
        "batch_size": 4,
        "max_steps": 3,
        "lr": 1e-2,
        "cutoff_len": 128,
    }
    return {**entry, **changes}


def run_config(base: Path, output_dir: Path, *entries: Mapping[str, Any], **changes: Any) -> TrainConfig:
    """The config of a run of these adapters, with short prompts and without answers at the end."""
    fields = {
        "base_model": str(base),
        "output_dir": str(output_dir),
        "device": "cpu",
        "answer_examples": 0,
        "defaults": {"template": str(base / "short.yaml")},
        "adapters": list(entries),
    }
    return TrainConfig.from_dict({**fields, **changes})


def quiet_console() -> Console:
    """A console whose text nobody sees but the test, in ``console.file``."""
    return Console(file=io.StringIO(), width=200)


def new_trainer(config: TrainConfig) -> Trainer:
    """A trainer that prints nothing."""
    return Trainer(config, console=quiet_console())


def train(config: TrainConfig) -> TrainResult:
    """Run a config to its end, silently."""
    return new_trainer(config).train()
