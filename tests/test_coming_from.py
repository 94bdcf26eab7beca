"""The pages for those who come from elsewhere say of every key and call what the code does with it.

The original's keys and calls are data here, taken from its own code (``tools/make_original_configs.py``); PEFT's are
asked of PEFT.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import peft.optimizers
import pytest

import moe_peft
from moe_peft import LlamaForCausalLM, TrainConfig
from moe_peft.config import AdapterJob
from moe_peft.config.job import adapter_keys
from moe_peft.config.original import translate
from moe_peft.io.adapter_files import CONFIG_FILE, read_adapter_config

ROOT = Path(__file__).resolve().parent.parent
KEYS = json.loads((ROOT / "tests" / "config" / "fixtures" / "original.json").read_text())["keys"]
# The public names of the original's package, 2.0.2.
ORIGINAL_NAMES = [
    "LLMCache",
    "cache_factory",
    "LLMModelConfig",
    "LLMModelOutput",
    "LLMForCausalLM",
    "LLMBatchConfig",
    "LLMModelInput",
    "AdapterConfig",
    "LoraConfig",
    "adapter_factory",
    "TrainTask",
    "Dispatcher",
    "EvaluateConfig",
    "evaluate",
    "GenerateConfig",
    "generate",
    "TrainConfig",
    "train",
    "LLMModel",
    "Prompter",
    "Tokenizer",
    "setup_logging",
    "executor",
]
# The options of its main program.
ORIGINAL_OPTIONS = [
    "base_model",
    "inference",
    "evaluate",
    "disable_prompter",
    "load_adapter",
    "disable_adapter",
    "attn_impl",
    "sliding_window",
    "disable_cache",
    "cache_implementation",
    "fp16",
    "bf16",
    "tf32",
    "load_8bit",
    "load_4bit",
    "device",
    "config",
    "seed",
    "dir",
    "disable_log",
    "log_file",
    "verbose",
    "overwrite",
    "debug",
    "deterministic",
]

LORA = {"name": "a", "data": "a.json", "num_epochs": 1, "batch_size": 4, "lr": 1e-3, "r": 2, "lora_alpha": 4}
LORA |= {"lora_dropout": 0.1, "target_modules": ["q_proj", "up_proj"]}
MIXTURE = {**LORA, "routing_strategy": "mixlora", "num_experts": 4}
RUN = {"cutoff_len": 64, "lora": [LORA]}
# A value of each key that is not its default, and what ours then says (where the name changes nothing, the same).
RUN_VALUES: dict[str, Any] = {
    "save_step": 7,
    "train_lora_simultaneously_num": 3,
    "train_lora_candidate_num": 5,
    "train_strategy": "none",
    "inference_lora_simultaneously_num": 5,
    "eval_lora_simultaneously_num": 5,
    "eval_rollback_retrying_steps": 5,
    "evaluate_result": "x.json",
}
ENTRY_VALUES: dict[str, Any] = {
    "name": "b",
    "task_name": "boolq",
    "data": "b.jsonl",
    "prompt": "alpaca",
    "num_epochs": 5,
    "batch_size": 6,
    "micro_batch_size": 2,
    "optim": "sgd",
    "lr": 0.5,
    "loraplus_lr_ratio": 4.0,
    "momentum": 0.5,
    "weight_decay": 0.5,
    "scheduler_type": "linear",
    "warmup_ratio": 0.25,
    "warmup_steps": 3,
    "group_by_length": True,
    "evaluate_steps": 5,
    "evaluate_batch_size": 5,
    "r": 3,
    "lora_alpha": 9,
    "lora_dropout": 0.5,
    "lora_init": "gaussian",
    "target_modules": ["up_proj"],
    "use_rslora": True,
    "use_dora": True,
    "peft_type": "MIXLORA",
    "routing_strategy": "mixlora",
    "num_experts": 3,
    "top_k": 3,
    "router_aux_loss_coef": 0.5,
    "router_loss": False,
    "router_init_range": 0.5,
    "jitter_noise": 0.5,
    "act_fn": "gelu",
    "expert_lora": {"r": 7},
    "top_p": 0.5,
    "temperature": 0.5,
    "router_z_loss_coef": 0.5,
    "expert_capacity": 5,
    "ffn_dropout": 0.5,
    "sparse_step": 2,
}
OURS = {
    "method": "mixlora",
    "use_dora": "dora",
    "router_loss": 0.0,
    "expert_lora": moe_peft.MixLoraConfig(expert_lora={"r": 7}).expert_lora,
    "target_modules": ("up_proj",),
}

# A value of each field of PEFT's that means something.
PEFT_VALUES: dict[str, Any] = {
    "r": 3,
    "lora_alpha": 5,
    "lora_dropout": 0.5,
    "use_rslora": True,
    "target_modules": ["v_proj"],
    "init_lora_weights": "pissa",
    "use_dora": True,
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "inference_mode": True,
    "base_model_name_or_path": "x",
    "auto_mapping": {"base_model_class": "X"},
    "peft_version": "0.1",
    "revision": "main",
    "layers_pattern": "layers",
    "megatron_core": "megatron.core",
    "eva_config": {"rho": 2.0},
    "qalora_group_size": 8,
    "runtime_config": {"ephemeral_gpu_offload": False},
    "ensure_weight_tying": True,
    "bias": "all",
    "rank_pattern": {"q_proj": 4},
    "alpha_pattern": {"q_proj": 4},
    "layers_to_transform": [0],
    "layer_replication": [[0, 1]],
    "exclude_modules": ["q_proj"],
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": [1],
    "target_parameters": ["x"],
    "alora_invocation_tokens": [1],
}


def table(page: str, heading: str) -> dict[str, str]:
    """The second column of the table under a heading, by every name in the first one; no name stands in two rows."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    found: dict[str, str] = {}
    for line in text.splitlines():
        if line.startswith("| `"):
            names, here = line.split("|")[1:3]
            for name in re.findall(r"`([^`]+)`", names):
                assert name not in found, name
                found[name] = here.strip()
    assert found
    return found


def name_in(here: str) -> str:
    """The first name of ours that a cell gives."""
    name = re.match(r"`([^`]+)`", here)
    assert name, here
    return name[1]


RUN_TABLE = table("coming-from-moe-peft.md", "Keys of a run")
ENTRY_TABLE = table("coming-from-moe-peft.md", "Keys of an adapter")
PEFT_TABLE = table("coming-from-peft.md", "Fields of its LoraConfig")


def test_every_key_of_the_original_is_in_the_page_and_no_other() -> None:
    assert sorted(RUN_TABLE) == KEYS["run"]
    assert sorted(ENTRY_TABLE) == KEYS["entry"]
    assert {*RUN_VALUES, "cutoff_len", "lora"} == set(KEYS["run"])
    assert set(ENTRY_VALUES) == set(KEYS["entry"])


def read_run(config: dict[str, Any]) -> TrainConfig:
    return TrainConfig.from_dict({"base_model": "x", **translate(config)[0]})


@pytest.mark.parametrize("key", RUN_VALUES)
def test_a_key_of_a_run_does_what_the_page_says(key: str) -> None:
    config = {**RUN, key: RUN_VALUES[key]}
    told = any(remark.startswith(f"{key} has no effect") for remark in translate(config)[1])
    if RUN_TABLE[key] == "no effect":
        assert told
        assert read_run(config) == read_run(RUN)
    else:
        assert not told
        assert getattr(read_run(config), name_in(RUN_TABLE[key])) == RUN_VALUES[key]


def test_cutoff_len_and_lora() -> None:
    (job,) = read_run(RUN).adapters
    assert (getattr(job, name_in(RUN_TABLE["cutoff_len"])), name_in(RUN_TABLE["lora"])) == (64, "adapters")


@pytest.mark.parametrize("key", ENTRY_VALUES)
def test_a_key_of_an_adapter_does_what_the_page_says(key: str) -> None:
    here, value = ENTRY_TABLE[key], ENTRY_VALUES[key]
    routed = key not in LORA and adapter_keys_of_mixtures(key)
    plain = {**(MIXTURE if routed else LORA), **({"optim": "sgd"} if key == "momentum" else {})}
    if key in ("peft_type", "routing_strategy"):
        plain = {**MIXTURE, "peft_type": "MIXLORA"}
    config = {**RUN, "lora": [{**plain, key: value}]}
    if here == "refused" or here.startswith("only "):
        with pytest.raises(ValueError, match=rf"lora\[0\]\.{key}="):
            translate(config)
        if here.startswith("only "):
            allowed = name_in(here.removeprefix("only "))
            only = {"null": None, "false": False}.get(allowed, allowed)
            assert read_run({**RUN, "lora": [{**plain, key: only}]}) == read_run({**RUN, "lora": [plain]})
    elif here == "no effect":
        assert any(remark.startswith(f"{key} has no effect") for remark in translate(config)[1])
        assert read_run(config) == read_run({**RUN, "lora": [plain]})
    else:
        expected = OURS.get(key, OURS.get(name_in(here), value)) if key != "router_aux_loss_coef" else value
        assert setting(read_run(config).adapters[0], name_in(here)) == expected


def adapter_keys_of_mixtures(key: str) -> bool:
    """Whether the original reads a key for mixtures only."""
    routing = {"top_p", "temperature", "expert_capacity", "ffn_dropout", "sparse_step", "act_fn", "jitter_noise"}
    return key in routing or key.startswith(("router_", "expert_", "num_experts", "top_k"))


def setting(job: AdapterJob, name: str) -> Any:
    assert name in adapter_keys(job.method)
    return getattr(job, name) if hasattr(job, name) else getattr(job.adapter, name)


def test_every_field_of_peft_is_in_the_page_and_no_other() -> None:
    assert set(PEFT_TABLE) == {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert set(PEFT_TABLE.values()) == {"read", "no effect", "refused"}


@pytest.mark.parametrize("field", PEFT_TABLE)
def test_a_field_of_peft_does_what_the_page_says(field: str, tmp_path: Path) -> None:
    plain = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}
    value = PEFT_VALUES.get(field, True if PEFT_TABLE[field] == "refused" else None)
    (tmp_path / CONFIG_FILE).write_text(json.dumps({**plain, field: value}))
    if PEFT_TABLE[field] == "refused":
        with pytest.raises(ValueError, match=rf"{field}=.* changes the adapter and is not supported"):
            read_adapter_config(tmp_path)
        for nothing in (None, False, {}, []):
            (tmp_path / CONFIG_FILE).write_text(json.dumps({**plain, field: nothing}))
            read_adapter_config(tmp_path)
        return
    read = read_adapter_config(tmp_path)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(plain))
    if PEFT_TABLE[field] == "no effect":
        assert value is not None
        assert read == read_adapter_config(tmp_path)
    elif field == "use_dora":
        assert (type(read).__name__, type(read_adapter_config(tmp_path)).__name__) == ("DoraConfig", "LoraConfig")
    elif field != "peft_type":  # read, and then of no more use
        assert getattr(read, field) == (tuple(value) if isinstance(value, list) else value)


def test_inits_that_change_the_base_are_read_or_refused(tmp_path: Path) -> None:
    text = (ROOT / "docs/coming-from-peft.md").read_text()
    (row,) = [line for line in text.splitlines() if line.startswith("| `init_lora_weights`")]
    read, refused = (re.findall(r"`(\w+)`", part) for part in row.partition("read")[2].split(";"))
    assert "pissa" in read
    assert "loftq" in refused
    for init in (*read, *refused):
        init = init.replace("_N", "_4")
        (tmp_path / CONFIG_FILE).write_text(json.dumps({"peft_type": "LORA", "init_lora_weights": init}))
        if init in refused:
            with pytest.raises(ValueError, match=f"init_lora_weights='{init}' was trained against a changed base"):
                read_adapter_config(tmp_path)
        else:
            assert read_adapter_config(tmp_path).init_lora_weights == init


def resolve(name: str, *roots: object) -> object:
    """What a dotted name means below one of these."""
    for root in roots:
        found = root
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is not None:
            return found
    raise AssertionError(f"there is no {name}")


def test_calls_of_the_original() -> None:
    calls = table("coming-from-moe-peft.md", "Calls")
    assert {call.split(".")[0] for call in calls} == set(ORIGINAL_NAMES)
    for here in calls.values():
        check_ours(here)


def test_calls_of_peft() -> None:
    calls = table("coming-from-peft.md", "Calls")
    for call, here in calls.items():
        if call == "PeftModel.peft_config":  # set by its __init__
            continue
        assert resolve(call, peft, peft.PeftModelForCausalLM, peft.tuners.lora), call
        check_ours(here)


def check_ours(here: str) -> None:
    if here in ("not here", "not needed"):
        return
    name = name_in(here)
    if name in adapter_keys(None):
        return
    resolve(name, moe_peft) if not name.startswith("model.") else resolve(name[len("model.") :], LlamaForCausalLM)


def test_options_of_the_original() -> None:
    options = table("coming-from-moe-peft.md", "The main program's options")
    assert set(options) == {f"--{option}" for option in ORIGINAL_OPTIONS}
    for here in options.values():
        for name in re.findall(r"`(\w+)=`", here):
            assert name in {field.name for field in dataclasses.fields(TrainConfig)}
