"""The tensors of an adapter under way, by name: what a checkpoint holds of it beside its record."""

from collections.abc import Mapping

import torch
from torch import Tensor

from moe_peft.adapters.method import resize
from moe_peft.training.adapter_run import AdapterRun

EXPERT_COUNTS = "expert_counts"


def tensors_of(run: AdapterRun) -> dict[str, Tensor]:
    """Everything that its next step depends on: weights, buffers, optimizer state, a gradient under way, kept weights.

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
    for kind, buffers in _buffers_of(run).items():
        named |= {f"{kind}.{key}": buffer for key, buffer in buffers.items()}
    if run.recent_counts is not None:
        named[EXPERT_COUNTS] = run.recent_counts
    return named


def _buffers_of(run: AdapterRun) -> dict[str, dict[str, Tensor]]:
    """What the method keeps beside its weights: now, beside the last good weights, beside the best."""
    live = run.model.adapter_buffers(run.job.name)
    return {"buffer": live, "good_buffer": run.good_buffers, "best_buffer": run.best_buffers}


def restore_tensors(run: AdapterRun, named: Mapping[str, Tensor]) -> None:
    """Put back what ``tensors_of`` gave of an adapter of the same settings.

    Raises:
        ValueError: when the tensors do not fit the adapter.
    """
    _check_shapes(run, named)
    with torch.no_grad():
        for i, weight in enumerate(run.parameters):
            saved = named[f"weight.{i}"]
            if weight.shape != saved.shape:  # it had grown
                resize(weight, saved.to(weight.device, copy=True))
                run.good_weights[i] = weight.detach().clone()
            weight.copy_(saved)
            run.good_weights[i].copy_(named[f"good.{i}"])
            gradient = named.get(f"gradient.{i}")
            weight.grad = None if gradient is None else gradient.to(weight.device, copy=True)
    if "best.0" in named:
        run.best_weights = [named[f"best.{i}"].to(weight.device, copy=True) for i, weight in enumerate(run.parameters)]
        run.best_buffers = _restored(run.good_buffers, named, "best_buffer")  # they have the same names
    run.good_buffers = _restored(run.good_buffers, named, "good_buffer")
    live = run.model.adapter_buffers(run.job.name)
    for key, value in _restored(live, named, "buffer").items():
        live[key].data = value
    for name, value in named.items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            key, _, index = rest.rpartition(".")
            weight = run.parameters[int(index)]
            run.optimizer.state[weight][key] = value.to(weight.device, copy=True)
    counts = named.get(EXPERT_COUNTS)
    run.recent_counts = None if counts is None else counts.to(run.parameters[0].device, copy=True)


def _restored(live: Mapping[str, Tensor], named: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    return {key: named[f"{kind}.{key}"].to(tensor.device, copy=True) for key, tensor in live.items()}


def _check_shapes(run: AdapterRun, named: Mapping[str, Tensor]) -> None:
    wanted: dict[str, Tensor] = {}
    for i, weight in enumerate(run.parameters):
        wanted |= {f"weight.{i}": weight, f"good.{i}": weight}
    for kind, buffers in _buffers_of(run).items():
        wanted |= {f"{kind}.{key}": buffer for key, buffer in buffers.items()}
    for name, tensor in wanted.items():
        found = named.get(name)
        if found is None or found.dtype != tensor.dtype or not _fits(run, found, tensor):
            has = "nothing" if found is None else f"{list(found.shape)} of {found.dtype}"
            raise ValueError(
                f"adapter {run.job.name!r}: the checkpoint has {has} where the adapter's "
                f"{name.replace('.', ' ', 1)} is {list(tensor.shape)} of {tensor.dtype}"
            )


def _fits(run: AdapterRun, found: Tensor, tensor: Tensor) -> bool:
    """Equal shapes; those of a method that changes them itself have as many dimensions."""
    if run.job.adapter.resizes:
        return found.dim() == tensor.dim()
    return found.shape == tensor.shape
