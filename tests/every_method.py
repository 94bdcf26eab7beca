"""The configs with which every registered method is tested, and batches in which all of them meet.

A method added later is tested by being registered: by its default config, and by one with dropout if it has any.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from builders import IGNORE, Run, add_random_adapter, random_run, run_step, tiny_config, tiny_model
from torch import Tensor

from moe_peft import LlamaForCausalLM, ModelOutput
from moe_peft.adapters import METHODS, Method

DROPOUT = 0.2
STD = 0.1  # of the weights, so that a sum of several updates is no larger than what it is added to
# What a method's defaults leave out, by a name that begins with the method's; each has dropout besides.
VARIANTS: dict[str, dict[str, Any]] = {
    "lora-rslora": {"use_rslora": True, "r": 3, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "lora-pissa": {"r": 4, "init_lora_weights": "pissa"},
    "dora-some": {"r": 3, "layers_to_transform": [1], "rank_pattern": {"q_proj": 5}},
    "mixlora-jitter": {"router_jitter_noise": 0.1, "router_z_loss_coef": 0.1, "num_experts": 5},
    "mixlora-switch": {"top_k": 1, "num_experts": 3, "target_modules": ["o_proj", "gate_proj"]},
    "adalora-pruned": {"init_r": 6, "target_r": 2, "tinit": 1, "tfinal": 1},
    "adaptive_lora-grown": {"r": 2, "grow_every": 2, "grow_share": 0.5},
    "bottleneck-pfeiffer": {"placement": "pfeiffer", "activation": "gelu", "bottleneck_size": 5},
    "ia3-attention": {"target_modules": ["q_proj", "o_proj"]},
    "vera-small": {"r": 7},
    "sparse_lora-movement": {"mask_type": "movement", "sparsity": 0.7},
    "hierarchical_lora-two": {"ranks": [6, 2], "alphas": [3, 8]},
    "quantized_lora-groups": {"bits": 3, "group_size": 5},
    "p_tuning-lstm": {"encoder_reparameterization_type": "LSTM", "num_virtual_tokens": 3},
    "prefix_tuning-projection": {"prefix_projection": True, "num_virtual_tokens": 3},
}
OTHER_MODEL = {"sliding_window": 3, "mlp_bias": True, "attention_bias": True}


def dropout_fields(method: type[Method]) -> list[str]:
    """The fields of a method that are shares of features to drop."""
    return [field.name for field in dataclasses.fields(method) if field.name.endswith("dropout")]


def _configs() -> dict[str, tuple[str, Method]]:
    found: dict[str, tuple[str, Method]] = {}
    for method, cls in METHODS.items():
        dropped = dict.fromkeys(dropout_fields(cls), DROPOUT)
        variants = {name: {**dropped, **own} for name, own in VARIANTS.items() if name.startswith(f"{method}-")}
        if dropped and not variants:
            variants[f"{method}-dropout"] = dropped
        found |= {name: (method, cls(**own)) for name, own in {method: {}, **variants}.items()}
    return found


CONFIGS = {name: config for name, (_, config) in _configs().items()}
METHOD_OF = {name: method for name, (method, _) in _configs().items()}


def without_dropout(config: Method) -> Method:
    """The same settings with nothing dropped."""
    return dataclasses.replace(config, **dict.fromkeys(dropout_fields(type(config)), 0.0))


def seed_of(name: str) -> int:
    """Of an adapter's weights: the same whoever else is attached."""
    return 10 + list(CONFIGS).index(name)


def model_with(
    names: Sequence[str], *, training: bool = False, dtype: torch.dtype = torch.float32, **changes: Any
) -> LlamaForCausalLM:
    """A tiny model that carries these configs, every weight random.

    Args:
        changes: fields of the model's config.
    """
    model = tiny_model(tiny_config(**changes), dtype=dtype)
    for name in names:
        add_random_adapter(model, name, CONFIGS[name], seed=seed_of(name), std=STD)
    return model.train(training)


def run_of(name: str, lengths: Sequence[int] | None = None) -> Run:
    """An adapter's samples and its place in its training, of its own."""
    seed = seed_of(name) if name else 1
    lengths = lengths or ((5, 1, 9), (4, 4), (7,), (2, 6, 3))[seed % 4]
    return random_run(name, lengths, seed=seed, step=seed % 3, micro_batch=seed % 2)


def answers_only(run: Run) -> Run:
    """The run with labels on the last two tokens of each sample alone."""
    labels = [[IGNORE] * (len(sample) - 2) + sample[-2:] for sample in run.samples]
    return dataclasses.replace(run, labels=labels)


_NAMES = ["", *CONFIGS]
ORDERS = [_NAMES, _NAMES[1::2] + _NAMES[::2], _NAMES[::3] + _NAMES[2::3][::-1] + _NAMES[1::3]]

Step = tuple[dict[str, ModelOutput], dict[str, dict[str, Tensor]]]


@functools.cache
def crowd(training: bool, is_other_model: bool) -> LlamaForCausalLM:
    """All configs on one model, for tests that leave it as it is: the float32 one, or ``OTHER_MODEL`` in float64."""
    changes = {"dtype": torch.float64, **OTHER_MODEL} if is_other_model else {}
    return model_with(list(CONFIGS), training=training, **changes)


@functools.cache
def fused_step(order: int, training: bool, is_other_model: bool) -> Step:
    """Everybody's outputs and gradients in one fused batch."""
    names = ORDERS[order]
    outputs, found = run_step(crowd(training, is_other_model), *(run_of(name) for name in names))
    return dict(zip(names, outputs, strict=True)), found
