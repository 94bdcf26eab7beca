"""The tensors of an adapter under way, by name: what a checkpoint holds of it beside its record."""

from collections.abc import Mapping

import torch
from torch import Tensor

from moe_peft.training.adapter_run import AdapterRun

EXPERT_COUNTS = "expert_counts"


def tensors_of(run: AdapterRun) -> dict[str, Tensor]:
    """Everything that its next step depends on: weights, optimizer state, a half accumulated gradient, kept weights.

    Returns:
        Names such as ``weight.3`` (the fourth parameter) to tensors, some of which are the live ones.
    """
    named: dict[str, Tensor] = {}
    for i, weight in enumerate(run.parameters):
        named[f"weight.{i}"] = weight.detach()
        named[f"good.{i}"] = run.good_weights[i]
        if run.best_weights is not None:
            named[f"best.{i}"] = run.best_weights[i]
        if weight.grad is not None:
            named[f"gradient.{i}"] = weight.grad
        for key, value in run.optimizer.state.get(weight, {}).items():
            if isinstance(value, Tensor):
                named[f"optimizer.{key}.{i}"] = value
    if run.recent_counts is not None:
        named[EXPERT_COUNTS] = run.recent_counts
    return named


def restore_tensors(run: AdapterRun, named: Mapping[str, Tensor]) -> None:
    """Put back what ``tensors_of`` gave of an adapter of the same settings.

    Raises:
        ValueError: when the tensors do not fit the adapter.
    """
    _check_shapes(run, named)
    with torch.no_grad():
        for i, weight in enumerate(run.parameters):
            weight.copy_(named[f"weight.{i}"])
            run.good_weights[i].copy_(named[f"good.{i}"])
            gradient = named.get(f"gradient.{i}")
            weight.grad = None if gradient is None else gradient.to(weight.device, copy=True)
    if "best.0" in named:
        run.best_weights = [named[f"best.{i}"].to(weight.device, copy=True) for i, weight in enumerate(run.parameters)]
    for name, value in named.items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            key, _, index = rest.rpartition(".")
            weight = run.parameters[int(index)]
            run.optimizer.state[weight][key] = value.to(weight.device, copy=True)
    counts = named.get(EXPERT_COUNTS)
    run.recent_counts = None if counts is None else counts.to(run.parameters[0].device, copy=True)


def _check_shapes(run: AdapterRun, named: Mapping[str, Tensor]) -> None:
    for i, weight in enumerate(run.parameters):
        for kind in ("weight", "good"):
            found = named.get(f"{kind}.{i}")
            if found is None or found.shape != weight.shape or found.dtype != weight.dtype:
                has = "nothing" if found is None else f"{list(found.shape)} of {found.dtype}"
                raise ValueError(
                    f"adapter {run.job.name!r}: the checkpoint has {has} where the adapter's {kind} {i} is "
                    f"{list(weight.shape)} of {weight.dtype}"
                )
