"""An adapter folded into the frozen weights of the projections that it sits on."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moe_peft.model.batch import parse_expert_name
from moe_peft.model.linear import AdapterDict, Linear, LinearAdapter, wide_dtype

if TYPE_CHECKING:
    from moe_peft.model.host import AdapterHost


@dataclass(frozen=True)
class Merge:
    """An adapter that is in the base weights now.

    Args:
        name: the adapter.
        originals: by the path of a ``Linear``, its frozen weight and bias, which are replaced.
    """

    name: str
    originals: dict[str, dict[str, nn.Parameter]]


def merge(model: "AdapterHost", name: str) -> Merge:
    """Replace the frozen parameters under an adapter by merged ones; when it raises, everything is as it was.

    Raises:
        ValueError: as ``AdapterHost.merge_adapter``.
    """
    check_mergeable(model, name)
    done = Merge(name, {})
    try:
        for path, linear in adapted_linears(model, name):
            base = linear.base_layer_
            weight, bias = merged_base(linear, name, path)
            done.originals[path] = dict(base.named_parameters(recurse=False))
            base.weight = nn.Parameter(weight, requires_grad=False)
            if bias is not None:
                base.bias = nn.Parameter(bias, requires_grad=False)
    except BaseException:
        unmerge(model, done)
        raise
    return done


def unmerge(model: "AdapterHost", done: Merge) -> None:
    """Put the original parameters back, to where the model has gone meanwhile."""
    for path, originals in done.originals.items():
        linear = model.get_submodule(path)
        assert isinstance(linear, Linear)
        weight = linear.base_layer_.weight
        for kind, original in originals.items():
            # Nothing registers the originals, so that `.to()` has passed them by.
            original.data = original.data.to(weight.device, weight.dtype)
            setattr(linear.base_layer_, kind, original)


def adapted_linears(model: "AdapterHost", name: str) -> Iterator[tuple[str, Linear]]:
    """Path and layer of every projection that an adapter sits on."""
    for path, module in model.named_modules():
        if isinstance(module, Linear) and name in module.loras_:
            yield path, module


@torch.no_grad()
def merged_base(linear: Linear, name: str, path: str, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor | None]:
    """A projection's weight ``[O, I]`` and bias ``[O]`` with an adapter in them: computed wide, then rounded once.

    Args:
        path: what the layer is called in messages.
        dtype: of the result; None: the frozen weight's.

    Raises:
        ValueError: when the layer has no bias to take up what belongs there, or the result is not finite.
    """
    base = linear.base_layer_
    wide, dtype = wide_dtype(base.weight.dtype), dtype or base.weight.dtype
    weight, bias = linear.loras_[name].merged(base.weight.to(wide), None if base.bias is None else base.bias.to(wide))
    if bias is not None and base.bias is None:
        raise ValueError(f"adapter {name!r} cannot be merged: it adds a bias to {path}, which has none")
    rounded = weight.to(dtype), None if bias is None else bias.to(dtype)
    if not all(part.isfinite().all() for part in rounded if part is not None):
        raise ValueError(
            f"adapter {name!r} cannot be merged: {path} would hold values that are not finite. Its weights are "
            f"damaged, or overflow in {dtype}"
        )
    return rounded


def check_mergeable(model: "AdapterHost", name: str) -> None:
    """Refuse an adapter that is more than a change of the projections' weights and biases.

    Raises:
        ValueError: naming the adapter, and what of it no weight can equal.
    """
    if isinstance(name, str) and parse_expert_name(name):
        raise ValueError(f"{name!r} cannot be merged: it is one expert, which acts within its mixture alone")
    config = model.adapter_config(name)
    if config.has_router:
        raise ValueError(
            f"adapter {name!r} cannot be merged: the router of {type(config).__name__} chooses experts for every "
            "token, so that no single weight equals it"
        )
    outside = place_outside_of_projections(model, name)
    if outside is not None:
        raise ValueError(
            f"adapter {name!r} cannot be merged: what {type(config).__name__} keeps in {outside} acts outside of the "
            "projections, so that no weight of theirs equals it"
        )
    for path, linear in adapted_linears(model, name):
        if not has_merged_form(linear.loras_[name]):
            raise ValueError(
                f"adapter {name!r} cannot be merged: what {type(config).__name__} does at {path} is no change of its "
                "weight"
            )


def place_outside_of_projections(model: "AdapterHost", name: str) -> str | None:
    """Where an adapter keeps what is no projection's, or else an expert of it; None: nowhere."""
    of_experts = None
    for path, module in model.named_modules():
        if not isinstance(module, AdapterDict):
            continue
        is_projections = isinstance(model.get_submodule(path.rpartition(".")[0]), Linear)
        if name in module and not is_projections:
            return path
        if any(expert and expert[0] == name for expert in map(parse_expert_name, module)):
            of_experts = of_experts or path
    return of_experts


def has_merged_form(adapter: LinearAdapter) -> bool:
    """Whether ``merged`` tells all that the adapter does: one that changes more says itself what becomes of it."""
    does_more = adapter.changes_input_ or adapter.changes_output_
    return not does_more or type(adapter).merged is not LinearAdapter.merged
