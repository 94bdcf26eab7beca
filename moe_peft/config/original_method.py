"""The methods of the original MoE-PEFT: which of them are here, and how their settings are spelled."""

from collections.abc import Mapping
from typing import Any

from moe_peft.strict import check_keys, did_you_mean, join, nearest, show

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Of Phi, Phi-3 and GLM, which the original knows beside LLaMA.
OTHER_PROJECTIONS = ("dense", "fc1", "fc2", "qkv_proj", "gate_up_proj", "dense_h_to_4h", "dense_4h_to_h")
_METHODS = {"LORA": "lora", "MIXLORA": "mixlora"}
PEFT_TYPE_OF = {
    "mixlora": "MIXLORA",
    "mixlora-dynamic": "MIXLORA",
    "mixlora-switch": "MIXLORA",
    "loramoe": "LORAMOE",
    "mola": "MOLA",
}
# A mixture's keys that go on, and the names that they have here; and its other ones.
_ROUTED_NAMES = {
    "num_experts": "num_experts",
    "top_k": "top_k",
    "router_aux_loss_coef": "router_aux_loss_coef",
    "router_init_range": "router_init_range",
    "jitter_noise": "router_jitter_noise",
}
ROUTED_KEYS = (*_ROUTED_NAMES, "router_loss", "act_fn", "expert_lora")
# Keys of strategies that are not here.
STRATEGY_OF_KEY = {
    "top_p": "mixlora-dynamic",
    "temperature": "mixlora-dynamic",
    "router_z_loss_coef": "mixlora-switch",
    "expert_capacity": "mixlora-switch",
    "ffn_dropout": "mixlora-switch",
    "sparse_step": "mixlora-switch",
}
INITS = {"original": True, "gaussian": "gaussian"}
_EXPERT_KEYS = {
    "r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "use_rslora": "use_rslora",
    "lora_init": "init_lora_weights",
}
_NO_DORA = "a mixture here is made of LoRA alone"
# Its defaults.
_TOP_K, _AUX_LOSS_COEF = 2, 0.001


def method_of(entry: Mapping[str, Any], path: str) -> str:
    """The method here of an adapter's settings there: ``lora``, ``dora`` or ``mixlora``.

    Raises:
        ValueError: on a type or a routing strategy that is unknown, or not here, and on DoRA in a mixture.
    """
    strategy, peft_type = entry.get("routing_strategy"), entry.get("peft_type")
    if strategy is not None:
        check_strategy(strategy, path)
    if peft_type is None:
        peft_type = "LORA" if strategy is None else PEFT_TYPE_OF[strategy]
    if not isinstance(peft_type, str) or peft_type not in _METHODS:
        rule = f"must be one of {', '.join(_METHODS)}{did_you_mean(peft_type, _METHODS)}"
        raise ValueError(f"{join(path, 'peft_type')}={show(peft_type)} {rule}")
    if (peft_type == "MIXLORA") != (strategy is not None):
        raise ValueError(
            f"{join(path, 'peft_type')}={show(peft_type)} does not go with routing_strategy={show(strategy)}: "
            "a mixture has one, LoRA has none"
        )
    use_dora = entry.get("use_dora", False)
    if not isinstance(use_dora, bool):
        raise ValueError(f"{join(path, 'use_dora')}={show(use_dora)} must be true or false")
    if use_dora and peft_type != "LORA":
        raise ValueError(f"{join(path, 'use_dora')}=True must be false beside a routing_strategy: {_NO_DORA}")
    return "dora" if use_dora else _METHODS[peft_type]


def check_strategy(strategy: object, path: str = "") -> None:
    """Refuses every routing strategy but ``mixlora``, the only one here."""
    if strategy == "mixlora":
        return
    is_known = isinstance(strategy, str) and strategy in PEFT_TYPE_OF
    why = "the original has this method, and it is not here" if is_known else "no such strategy is known"
    raise ValueError(f"{join(path, 'routing_strategy')}={show(strategy)} must be 'mixlora': {why}")


def routed_settings(values: Mapping[str, Any], path: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits off a mixture's settings, under our names and with the original's defaults.

    Args:
        values: an adapter's entry, or the adapter_config.json of a saved one.
        path: where they stand; put before every field named in an error.

    Returns:
        The other settings as they are, and the mixture's.

    Raises:
        ValueError: on a setting that a mixture here does not have.
    """
    check_strategy(values.get("routing_strategy"), path)
    for key, strategy in STRATEGY_OF_KEY.items():
        if key in values:
            raise ValueError(f"{join(path, key)}={show(values[key])} is a key of routing_strategy={strategy!r}")
    if "num_experts" not in values:
        raise ValueError(f"{join(path, 'num_experts')} is missing: the original requires it")
    act_fn, router_loss = values.get("act_fn"), values.get("router_loss", True)
    if act_fn not in (None, "silu", "swish"):
        raise ValueError(f"{join(path, 'act_fn')}={show(act_fn)} must be 'silu': experts have the base model's own")
    if not isinstance(router_loss, bool):
        raise ValueError(f"{join(path, 'router_loss')}={show(router_loss)} must be true or false")
    settings: dict[str, Any] = {"top_k": _TOP_K, "router_aux_loss_coef": _AUX_LOSS_COEF}
    settings |= {name: values[key] for key, name in _ROUTED_NAMES.items() if key in values}
    if not router_loss:
        settings["router_aux_loss_coef"] = 0.0
    if "expert_lora" in values:
        settings["expert_lora"] = _expert_settings(values["expert_lora"], join(path, "expert_lora"))
    return {key: value for key, value in values.items() if key not in (*ROUTED_KEYS, "routing_strategy")}, settings


def _expert_settings(given: object, path: str) -> dict[str, Any]:
    """What the experts have otherwise than the attention."""
    elsewhere = {"target_modules": "experts sit on the adapter's own target_modules"}
    values = check_keys(given, (*_EXPERT_KEYS, "use_dora", "bias"), path, elsewhere)
    if values.get("use_dora", False) is not False:
        raise ValueError(f"{join(path, 'use_dora')}={show(values['use_dora'])} must be false: {_NO_DORA}")
    if values.get("bias", "none") != "none":
        raise ValueError(f"{join(path, 'bias')}={show(values['bias'])} must be 'none': biases are not trained")
    ours = {_EXPERT_KEYS[key]: value for key, value in values.items() if key in _EXPERT_KEYS}
    if "lora_init" in values:
        ours["init_lora_weights"] = one_of(INITS, values["lora_init"], join(path, "lora_init"))
    return ours


def one_of(choices: Mapping[str, Any], value: object, path: str) -> Any:
    """What a choice of the original's means here.

    Raises:
        ValueError: on a value that is none of them.
    """
    if not isinstance(value, str) or value not in choices:
        close = did_you_mean(value, choices)
        raise ValueError(f"{path}={show(value)} must be one of {', '.join(choices)}{close}")
    return choices[value]


def target_list(targets: object, path: str) -> list[str]:
    """The target projections, which the original takes as a list or as a mapping to true and false.

    Raises:
        ValueError: on a name that is no projection of a LLaMA; the original passes over it.
    """
    path = join(path, "target_modules")
    if isinstance(targets, Mapping):
        chosen = dict(targets)
    elif isinstance(targets, list) and all(isinstance(name, str) for name in targets):
        chosen = dict.fromkeys(targets, True)
    else:
        raise ValueError(f"{path}={show(targets)} must be a list of names, or a mapping of names to true or false")
    for name, is_target in chosen.items():
        if name not in (*PROJECTIONS, *OTHER_PROJECTIONS):
            raise ValueError(f"{path} has {name!r}, which is no projection{nearest(str(name), PROJECTIONS)}")
        if not isinstance(is_target, bool):
            raise ValueError(f"{join(path, name)}={show(is_target)} must be true or false")
        if is_target and name in OTHER_PROJECTIONS:
            raise ValueError(f"{path} has {name!r}, of Phi or GLM: the base models here are of LLaMA's family")
    return [name for name in PROJECTIONS if chosen.get(name)]
