"""Makes tests/config/fixtures/original.json: how the original itself, PyPI's moe-peft 2.0.2, reads configs.

    PYTHON tools/make_original_configs.py tests/config/fixtures/original.json

PYTHON is of an environment that has the original: ``benchmarks/peers.py`` makes one for its cases with it. The file
holds every key that the original's code looks up, and for each of some configs what it makes of them: its settings, and
the learning rates of its own optimizer and schedule. It needs nothing of this project.
"""

import json
import os
import sys
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import ClassVar

os.environ["MOE_PEFT_EXECUTOR_TYPE"] = "CPU"  # it reads this as it is imported

import torch

from moe_peft.adapters import lora_config_factory, routing_strategy_dict  # theirs, not ours
from moe_peft.evaluator import EvaluateConfig
from moe_peft.trainer import TrainConfig

# What its main program looks up (moe_peft.py, a script beside the package), and what its templates hold beside that.
RUN_KEYS = [
    "cutoff_len",
    "lora",
    "train_lora_simultaneously_num",
    "train_strategy",
    "save_step",
    "inference_lora_simultaneously_num",
    "eval_lora_simultaneously_num",
    "eval_rollback_retrying_steps",
    "evaluate_result",
]
TEMPLATE_RUN_KEYS, TEMPLATE_ENTRY_KEYS = ["train_lora_candidate_num"], ["warmup_steps"]

TARGETS = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"), True)
ENTRY = {
    "name": "casual_0",
    "task_name": "casual",
    "data": "data.json",
    "prompt": "alpaca",
    "optim": "adamw",
    "scheduler_type": "constant",
    "warmup_steps": 0,
    "lr": 2e-4,
    "batch_size": 16,
    "micro_batch_size": 8,
    "evaluate_batch_size": 16,
    "num_epochs": 2,
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "target_modules": TARGETS,
    "group_by_length": False,
}
MIXTURE = {"routing_strategy": "mixlora", "num_experts": 8, "top_k": 2}
LEAST = ("name", "num_epochs", "batch_size", "lr", "r", "lora_alpha", "lora_dropout")
ENTRIES = {
    "lora": ENTRY,
    "loraplus": {**ENTRY, "loraplus_lr_ratio": 20.0},
    "mixlora": {**ENTRY, **MIXTURE},
    "expert_lora": {
        **ENTRY,
        **MIXTURE,
        "expert_lora": {"r": 4, "lora_alpha": 12, "use_rslora": True, "lora_init": "gaussian"},
    },
    "router": {
        **ENTRY,
        **MIXTURE,
        "router_aux_loss_coef": 0.02,
        "router_init_range": 0.1,
        "jitter_noise": 0.05,
        "act_fn": "silu",
    },
    "no router loss": {**ENTRY, **MIXTURE, "peft_type": "MIXLORA", "router_loss": False},
    "least": {**{key: ENTRY[key] for key in LEAST}, "target_modules": ["v_proj", "q_proj"]},
    "least mixture": {
        **{key: ENTRY[key] for key in LEAST},
        "target_modules": {"up_proj": True, "q_proj": False, "dense": False},
        "routing_strategy": "mixlora",
        "num_experts": 3,
    },
    "sgd": {**ENTRY, "optim": "sgd", "momentum": 0.9, "weight_decay": 0.1, "scheduler_type": "linear"},
    "cosine": {**ENTRY, "scheduler_type": "cosine", "use_rslora": True, "lora_init": "gaussian"},
    "warm-up": {**ENTRY, "scheduler_type": "constant_with_warmup", "warmup_ratio": 0.5, "prompt": None},
}
NUM_RECORDS = 50  # of which the learning rates are made


class Recorder(dict):
    """A config that notes which of its keys are asked for."""

    asked: ClassVar[set[str]] = set()

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)


def main(path: Path) -> None:
    """Write the file."""
    configs = {}
    for name, entry in ENTRIES.items():
        config = {
            "cutoff_len": 512,
            "save_step": 1000,
            "train_lora_candidate_num": 2,
            "train_lora_simultaneously_num": 2,
            "train_strategy": "optim",
            "lora": [entry],
        }
        configs[name] = {"config": config, "read": read(entry)}
    keys = {"run": sorted({*RUN_KEYS, *TEMPLATE_RUN_KEYS}), "entry": entry_keys()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"keys": keys, "configs": configs}, indent=1) + "\n")


def entry_keys() -> list[str]:
    """The keys of an adapter that any of its readers looks up, whatever the method."""
    for strategy in (None, *routing_strategy_dict):
        entry = Recorder({**ENTRY, **MIXTURE, "expert_lora": {}, "routing_strategy": strategy})
        lora_config_factory(entry)
        TrainConfig.from_config(entry)
        EvaluateConfig.from_config(Recorder({**entry, "task_name": "boolq"}))
    return sorted({*Recorder.asked, *TEMPLATE_ENTRY_KEYS})


def read(entry: dict) -> dict:
    """What the original makes of an adapter's entry."""
    training = TrainConfig.from_config(entry)
    weights = {"q.lora_A.weight": torch.ones(2, 2), "q.lora_B.weight": torch.ones(2, 2)}
    if "routing_strategy" in entry:
        weights["mlp.moe_gate.weight"] = torch.ones(2, 2)
    for weight in weights.values():
        weight.requires_grad_()
    training.prepare(weights)
    training.prepare_lr_scheduler(NUM_RECORDS)
    settings = {key: plain(value) for key, value in vars(lora_config_factory(entry)).items()}
    names = ("num_epochs", "batch_size", "micro_batch_size", "optimizer_type", "learning_rate", "momentum")
    names += ("weight_decay", "loraplus_lr_ratio", "scheduler_type", "warmup_ratio", "data_path", "prompt_template")
    return {
        "training": {name: getattr(training, name) for name in names},
        "accumulation_step": training.accumulation_step_,
        "num_records": NUM_RECORDS,
        "rates": rates(training, weights),
        "decay": [group["weight_decay"] for group in training.optimizer_.param_groups],
        "adapter": settings,
    }


def rates(training: TrainConfig, weights: dict) -> dict:
    """The learning rate of each weight at each of its optimizer's steps."""
    num_steps = -(-NUM_RECORDS // training.batch_size) * training.num_epochs
    found = {name: [] for name in weights}
    for _ in range(num_steps):
        for name, weight in weights.items():
            (group,) = [g for g in training.optimizer_.param_groups if any(p is weight for p in g["params"])]
            found[name].append(group["lr"])
        training.optimizer_.step()
        training.lr_scheduler_.step()
    return found


def plain(value: object) -> object:
    """A setting as JSON has it."""
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


if __name__ == "__main__":
    main(Path(sys.argv[1]))
