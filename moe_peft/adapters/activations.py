"""Activations without parameters, feature by feature, under the names that torch and transformers have for them."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn


def _unchanged(x: Tensor) -> Tensor:
    return x


def _clipped_gelu(x: Tensor) -> Tensor:
    return nn.functional.gelu(x).clamp(-10, 10)


def _laplace(x: Tensor) -> Tensor:
    """A normal distribution's function, near the square of relu (https://arxiv.org/abs/2209.10655)."""
    return 0.5 * (1 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2))))


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _relu_squared(x: Tensor) -> Tensor:
    """https://arxiv.org/abs/2109.08668."""
    return nn.functional.relu(x).square()


def _root_of_softplus(x: Tensor) -> Tensor:
    return nn.functional.softplus(x).sqrt()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "celu": nn.functional.celu,
    "elu": nn.functional.elu,
    "gelu": nn.functional.gelu,
    "gelu_10": _clipped_gelu,
    "gelu_tanh": partial(nn.functional.gelu, approximate="tanh"),
    "hardshrink": nn.functional.hardshrink,
    "hardsigmoid": nn.functional.hardsigmoid,
    "hardswish": nn.functional.hardswish,
    "hardtanh": nn.functional.hardtanh,
    "laplace": _laplace,
    "leaky_relu": nn.functional.leaky_relu,
    "linear": _unchanged,
    "logsigmoid": nn.functional.logsigmoid,
    "mish": nn.functional.mish,
    "quick_gelu": _quick_gelu,
    "relu": nn.functional.relu,
    "relu2": _relu_squared,
    "relu6": nn.functional.relu6,
    "selu": nn.functional.selu,
    "sigmoid": torch.sigmoid,
    "silu": nn.functional.silu,
    "softplus": nn.functional.softplus,
    "softshrink": nn.functional.softshrink,
    "softsign": nn.functional.softsign,
    "sqrtsoftplus": _root_of_softplus,
    "tanh": torch.tanh,
    "tanhshrink": nn.functional.tanhshrink,
}
# Other names of the same functions: transformers' and AdapterHub's.
_ALIASES = {
    "gelu_accurate": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_orig": "gelu",
    "gelu_python": "gelu",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "identity": "linear",
    "leakyrelu": "leaky_relu",
    "swish": "silu",
}
ACTIVATIONS |= {alias: ACTIVATIONS[name] for alias, name in _ALIASES.items()}
