"""Configs of the original MoE-PEFT (PyPI's moe-peft 2.0.2), told in the keys that a config has here."""

from collections.abc import Mapping
from typing import Any

from moe_peft.config.original_method import (
    INITS,
    ROUTED_KEYS,
    STRATEGY_OF_KEY,
    method_of,
    one_of,
    routed_settings,
    target_list,
)
from moe_peft.strict import check_keys, join, kind, show

# Its keys that go on, and the names that they have here.
RUN_KEYS = {"save_step": "save_steps", "train_lora_simultaneously_num": "max_concurrent_adapters"}
ENTRY_KEYS = {
    "name": "name",
    "data": "data",
    "prompt": "template",
    "num_epochs": "num_epochs",
    "batch_size": "batch_size",
    "micro_batch_size": "micro_batch_size",
    "optim": "optimizer",
    "lr": "lr",
    "loraplus_lr_ratio": "loraplus_lr_ratio",
    "momentum": "momentum",
    "weight_decay": "weight_decay",
    "scheduler_type": "lr_scheduler",
    "warmup_ratio": "warmup_ratio",
    "warmup_steps": "warmup_steps",
    "r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "use_rslora": "use_rslora",
    "lora_init": "init_lora_weights",
    "target_modules": "target_modules",
}
REQUIRED = ("name", "num_epochs", "batch_size", "lr", "r", "lora_alpha", "lora_dropout", "target_modules")
# What it does where a key is missing, and we would do something else.
DEFAULTS = {"template": "moe_peft", "weight_decay": 0.01, "lr_scheduler": "constant", "max_grad_norm": None}
# Its keys that change nothing about training, there or here, whatever their value; and why.
RUN_KEYS_WITHOUT_EFFECT = {
    "train_lora_candidate_num": "the original does not read it either",
    "train_strategy": "it chooses batches with little padding, and there is no padding here",
    "inference_lora_simultaneously_num": "it is not about training",
    "eval_lora_simultaneously_num": "it is not about training",
    "eval_rollback_retrying_steps": "it is not about training",
    "evaluate_result": "it is not about training",
}
ENTRY_KEYS_WITHOUT_EFFECT = {
    "evaluate_batch_size": "the original evaluates only on tasks that it knows by name; here, eval_data says on what",
}
# Its keys that have one value here; and what to do about any other.
ONLY_OFF: dict[str, tuple[object, str]] = {
    "group_by_length": (False, "it saves padding, of which there is none here; samples are shuffled: leave it out"),
    "evaluate_steps": (None, "there is nothing to evaluate on: leave it out, and give eval_data and eval_steps here"),
}
_TASKS = ("casual", "causal", "", None)
_OPTIMIZERS = {"adamw": "adamw", "sgd": "sgd"}
_SCHEDULERS = {"constant": "constant", "constant_with_warmup": "constant", "linear": "linear", "cosine": "cosine"}
_HOW_READ = " (a config of the original: lora[0] is adapters[0] here, and base_model=... is given with it)"
_SEE = "docs/coming-from-moe-peft.md"


def is_original(data: Mapping[str, Any]) -> bool:
    """Whether a config is one of the original's: it lists its adapters under ``lora``."""
    return isinstance(data.get("lora"), list) and "adapters" not in data


def as_ours(data: dict[str, Any], source: str) -> tuple[dict[str, Any], str, list[str]]:
    """A config file's content in our keys, whichever of the two it has; what to call it in errors; and remarks.

    Raises:
        ValueError: as :func:`translate`, naming the file.
    """
    if not is_original(data):
        return data, source, []
    try:
        ours, remarks = translate(data)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    return ours, source + _HOW_READ, remarks


def translate(data: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A config of the original as one of ours; ``base_model``, which it takes on its command line, stays to be given.

    Args:
        data: as its JSON says it.

    Returns:
        Plain data as :meth:`moe_peft.config.TrainConfig.from_dict` takes it, and what the user should know about keys
        that have no effect, or another one than there.

    Raises:
        ValueError: on a key or value that cannot be honoured, with the reason or what to use instead.
    """
    elsewhere = {"base_model": "the original has it on its command line, and here it stands there too: base_model=..."}
    values = check_keys(data, ("cutoff_len", "lora", *RUN_KEYS, *RUN_KEYS_WITHOUT_EFFECT), "", elsewhere)
    if "cutoff_len" not in values:
        raise ValueError("cutoff_len is missing: the original requires it")
    if values["cutoff_len"] == -1:
        raise ValueError("cutoff_len=-1 must be a number of tokens: the model's own limit is not looked up")
    if "train_strategy" in values:
        one_of({"optim": None, "none": None}, values["train_strategy"], "train_strategy")
    remarks = _without_effect(values, RUN_KEYS_WITHOUT_EFFECT)
    ours: dict[str, Any] = {RUN_KEYS[key]: value for key, value in values.items() if key in RUN_KEYS}
    ours["adapters"] = []
    for index, entry in enumerate(values["lora"]):
        job, remarks_on_job = _job(entry, f"lora[{index}]")
        ours["adapters"].append({**job, "cutoff_len": values["cutoff_len"]})
        remarks += remarks_on_job
    return ours, [*dict.fromkeys(remarks), f"{_SEE} says what else is done otherwise than by the original"]


def _job(entry: object, path: str) -> tuple[dict[str, Any], list[str]]:
    """One adapter's entry, and the remarks on it."""
    if not isinstance(entry, Mapping):
        raise ValueError(f"{path}={show(entry)} must be a mapping of keys to values, not {kind(entry)}")
    method = method_of(entry, path)
    of_method = ("peft_type", "routing_strategy", "use_dora")
    known = (*ENTRY_KEYS, *ENTRY_KEYS_WITHOUT_EFFECT, *ONLY_OFF, "task_name", *of_method)
    elsewhere = dict.fromkeys(ROUTED_KEYS, "it is a key of a mixture, and this adapter has no routing_strategy")
    elsewhere |= {key: f"it is a key of routing_strategy={name!r}" for key, name in STRATEGY_OF_KEY.items()}
    values = check_keys(entry, (*known, *(ROUTED_KEYS if method == "mixlora" else ())), path, elsewhere)
    for key in REQUIRED:
        if key not in values:
            raise ValueError(f"{join(path, key)} is missing: the original requires it")
    for key, (off, instead) in ONLY_OFF.items():
        if values.get(key, off) is not off:
            raise ValueError(f"{join(path, key)}={show(values[key])} must be {_json(off)}: {instead}")
    _check_data(values, path)
    remarks = [*_without_effect(values, ENTRY_KEYS_WITHOUT_EFFECT), *_remarks_on_warmup(values)]
    routed: dict[str, Any] = {}
    if method == "mixlora":
        values, routed = routed_settings(values, path)
        routed["decay_router"] = True  # its weight decay spares nothing
        if routed["top_k"] == 1:
            remarks.append("top_k=1: an expert's weight is its probability, or the router would learn nothing")
    left_out = [key for key in ("data", "prompt") if values.get(key) is None]
    ours = {ENTRY_KEYS[key]: values[key] for key in ENTRY_KEYS if key in values and key not in left_out}
    ours["target_modules"] = target_list(values["target_modules"], path)
    for key, choices in (("optim", _OPTIMIZERS), ("scheduler_type", _SCHEDULERS), ("lora_init", INITS)):
        if key in values:
            ours[ENTRY_KEYS[key]] = one_of(choices, values[key], join(path, key))
    if isinstance(steps := values.get("warmup_steps"), float):
        if not steps.is_integer():
            raise ValueError(f"{join(path, 'warmup_steps')}={steps} must be whole; a share is warmup_ratio")
        ours["warmup_steps"] = int(steps)
    return {"method": method, **DEFAULTS, **ours, **routed}, remarks


def _json(value: object) -> str:
    return "null" if value is None else str(value).lower()


def _without_effect(values: Mapping[str, Any], keys: Mapping[str, str]) -> list[str]:
    return [f"{key} has no effect: {reason}" for key, reason in keys.items() if key in values]


def _remarks_on_warmup(values: Mapping[str, Any]) -> list[str]:
    remarks = []
    if values.get("warmup_steps"):
        remarks.append("warmup_steps takes effect, which the original does not read")
    if values.get("warmup_ratio") and values.get("scheduler_type", "constant") == "constant":
        remarks.append("warmup_ratio takes effect, which the original passes over where scheduler_type is constant")
    return remarks


def _check_data(values: Mapping[str, Any], path: str) -> None:
    """Refuses what would have to be downloaded: tasks that the original knows by name, and data sets of the hub."""
    task, data, prompt = (values.get(key) for key in ("task_name", "data", "prompt"))
    if task not in _TASKS:
        raise ValueError(
            f"{join(path, 'task_name')}={show(task)} must be 'casual': tasks that the original downloads are not here; "
            'write records {"instruction": ..., "output": ...} to a file and name it in data'
        )
    if data is not None and not (isinstance(data, str) and data.endswith((".json", ".jsonl"))):
        raise ValueError(f"{join(path, 'data')}={show(data)} must be a .json or .jsonl file: no data set is downloaded")
    if isinstance(prompt, Mapping):
        raise ValueError(f"{join(path, 'prompt')} must be a template's name or file: write the mapping to a .json file")
