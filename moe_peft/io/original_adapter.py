"""Adapter folders of the original MoE-PEFT (PyPI's moe-peft): what its two files mean here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_peft.config.original import routed_settings
from moe_peft.strict import show

PICKLED_WEIGHTS_FILE = "adapter_model.bin"


def is_original_config(data: Mapping[str, Any]) -> bool:
    """Whether an adapter_config.json is of a mixture that the original saved: ours have no routing strategies."""
    return "routing_strategy" in data


def translate_adapter_config(data: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an original's adapter_config.json under the names that they have here.

    Raises:
        ValueError: on a routing strategy, an activation or an experts' setting that no method here has.
    """
    rest, settings = routed_settings(data)
    if settings["top_k"] == 1:
        raise ValueError(
            "top_k=1: the original gives the one expert the weight 1, mixtures here the router's probability, so the "
            "adapter would compute something else"
        )
    return {**rest, **settings}


def read_pickled_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of an ``adapter_model.bin``, as the original and older versions of PEFT write it.

    The file is a pickle. Only torch's restricted reader opens it: it builds tensors and plain containers, and calls no
    function that a file names.

    Raises:
        ValueError: on a damaged file, on one that holds anything but named dense tensors, or on a classifier's head.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged zip or pickle fails in many ways
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is damaged, or holds more than weights, and is not opened: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a dictionary of tensors, not {type(content).__name__}")
    for key, tensor in content.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise ValueError(f"{path}: the entry {show(key)} is not a dense tensor with a name")
    if "classifier" in content:
        raise ValueError(f"{path} has the head of a classifier, and only language models are trained and run here")
    return {key: tensor.detach() for key, tensor in content.items()}
